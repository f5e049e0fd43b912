#!/usr/bin/env python3
"""llm_proxy: lets many people share an LLM endpoint fairly, and loses no token it streams.

    BASE_API_URL=http://127.0.0.1:8000/v1 python llm_proxy.py   # then http://HOST:8899/v1
    python llm_proxy.py --demo                                  # brings its own endpoint

The first line is all that a start needs; clients are pointed at the address behind it. It needs
Python 3.9 or newer and nothing else. `--help` lists every setting.

One call, from its first byte to its last; one coroutine on one event loop runs it:

    client ──> Server ──> Proxy.serve ── identify ── route ── admit ── forward ── settle ──> Entry
               strict     (the story     who is      where    any      to the     what it    in the
               HTTP       of this file)  asking?     to?      room?    upstream   cost       log
    client <── Transfer <──────────────────────────────────────────── upstream  chunk by chunk

The words used here, one meaning each:

    Call      one LLM request, parsed: dialect, model, stream or not, payload
    Caller    who asks: a person or program behind a key, or an address; its socket is a client's
    Dialect   the only place that knows an API's wire names: paths, usage, limit replies, errors
    Hold      amounts reserved for one call over all its buckets: settled or given back in the end
    Upstream  where calls go: a name, a key, one or more addresses that can do the same
    Response  what came back: status, headers, a body that is still arriving
    Usage     what a call used: input, cached, output, reasoning tokens; `estimated` if not told
    Refusal   why not: raised at any depth, rendered in one place, in the caller's dialect
    Reply     the way back to the caller: begin, write, end, refuse
    Entry     what is written down of a call: filled on the way, recorded once, whatever the ending

Contents, in reading order; a section uses only what stands above it:

    Config      every setting, its default, its check, its line of help
    Refusals    every way to say no
    Callers     credentials -> Caller
    Limits      rules, buckets and holds
    Usage       tokens, prices, the estimate before and the cost after
    Dialects    the wire names of every API, limit replies, what responses report of usage
    Redaction   what must not leave, found in text, and its way back
    Wire        strict HTTP/1.1 in bytes: heads and framing of both sides
    Streams     sockets on the event loop: deadlines, reading, writing, carrying a body
    Line        the slots of a busy upstream, and the fair queue before them
    Stored      what callers made that upstreams keep: whose it is, and where it is
    Upstreams   addresses and their breakers, connections, responses; which call goes where
    Books       entries, the access log and the ledger
    Signals     what is told outside of the books: metrics, traces, warnings, the feed of events
    Shared      what several processes have in common: buckets, keys and sums in Redis
    Reply       the way back to one caller
    Proxy       serve: the life of one call; build: the parts list
    Pages       health, models, metrics, one's own quota
    Admin       the admin API: who uses what, keys, upstreams, live events
    Dashboard   the source of the page that shows it
    Server      clients' connections, caps, TLS, draining
    Workers     several processes on one port, and their parent
    Demo        a small endpoint to try things on
    Bench       calls that are timed, and what this machine can do
    Commands    the command line

To add something, these are all the places:

    a header on every answer     Reply.head
    an API                       a Dialect, its row in DIALECTS, its name in DIALECT_NAMES
    another store of buckets     a class as RedisBuckets, made in build_buckets
    a page                       a coroutine of Pages, its row in Pages.PAGES; if it streams events,
                                 by Reply.streaming
    a change of streamed text    an Edit such as HiddenUsage, added in Reply.editors_of
    a setting                    its row in SETTING_TABLE
    a command                    its row in COMMANDS
"""
import argparse
import array
import asyncio
import base64
import bisect
import concurrent.futures
import copy
import csv
import datetime
import difflib
import email.utils
import errno
import fnmatch
import gc
import getpass
import hashlib
import heapq
import hmac
import http.client
import http.server
import io
import ipaddress
import itertools
import json
import marshal
import math
import mmap
import operator
import os
import random
import re
import select
import signal
import socket
import sqlite3
import ssl
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import urllib.parse
import urllib.request
import zlib
import zoneinfo
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from contextlib import (ExitStack, asynccontextmanager, closing, contextmanager, nullcontext,
                        suppress)
from decimal import Decimal
from functools import lru_cache, partial, partialmethod, reduce
from itertools import chain, islice
from math import ceil, inf
from selectors import EVENT_READ, EVENT_WRITE, DefaultSelector
from typing import (Any, Awaitable, BinaryIO, Callable, Collection, Dict, FrozenSet, Iterable,
                    Iterator, List, Mapping, NamedTuple, Optional, Sequence, Set, Tuple, Union)
from weakref import WeakKeyDictionary

VERSION = "0.1.0"


# --------------------------------------------------------------------------------------------------
# Config: the only place that reads the text of settings. One table feeds the values, the checks,
# --help and README's tables; all faults are reported together, one line each. It does not know
# what the settings are used for.
# --------------------------------------------------------------------------------------------------

Texts = Dict[str, str]
JsonObject = Dict[str, Any]


def require(good, message):
    if not good:
        raise ValueError(message)


def table_of(text: str) -> Texts:
    """Returns a table whose rows are lines of a word and what belongs to it."""
    return dict(row.split(None, 1) for row in text.strip().splitlines())


def set_of(text: str) -> FrozenSet[str]:
    """Returns the words of a text."""
    return frozenset(text.split())


def pattern(shape, message, convert=re.Match.group):
    """Returns a reader of texts that match `shape` as a whole; `convert` makes the value of the
    match."""
    def read(text):
        match = re.fullmatch(shape, text)
        require(match, message)
        return convert(match)
    return read


def number_between(least, most, convert=int, shape="[0-9]{1,15}",
                   message="must be between {} and {}"):
    """Returns a reader of numbers; int() alone would also take '+5', '1_0' and ' 5 '."""
    def read(text):
        good = re.fullmatch(shape, text) and convert(least) <= convert(text) <= convert(most)
        require(good, message.format(least, most))
        return convert(text)
    return read


def one_of(*words):
    *others, last = words
    return pattern("|".join(words), f"must be {', '.join(others)} or {last}")


def word_or(words, read):
    """Returns a reader that knows the values of some words and leaves other texts to `read`."""
    return lambda text: words[text] if text in words else read(text)


def listed(read, separator=","):
    """Returns a reader of several texts with a separator between; which of them is at fault is told
    by its number, because it may be a secret."""
    def read_all(text):
        pieces = text.split(separator)
        values = []
        for number, piece in enumerate(pieces, 1):
            try:
                values.append(read(piece.strip()))
            except ValueError as fault:
                which = f"; number {number} is at fault" if len(pieces) > 1 else ""
                raise ValueError(f"{fault}{which}") from None
        return tuple(values)
    return read_all


def mapping(shape, message, convert, repeated=None):
    """Returns a reader of 'a=b, c=d' -> {'a': 'b', 'c': 'd'}; no name may be repeated."""
    def read(text):
        pairs = listed(pattern(shape, message, convert))(text)
        require(len(dict(pairs)) == len(pairs), repeated or message)
        return dict(pairs)
    return read


class Endpoint(NamedTuple):
    """A URL, taken apart; `path` has no trailing slash and may be empty."""
    scheme: str
    host: str
    port: int
    path: str = ""
    user: str = ""
    password: str = ""

    @property
    def origin(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if DEFAULT_PORTS[self.scheme] == self.port else f":{self.port}"
        return f"{self.scheme}://{host}{port}"

    @property
    def proxy_fields(self) -> Texts:
        """The header fields for a proxy on the way to upstreams; nobody else gets them."""
        user = base64.b64encode(f"{self.user}:{self.password}".encode()).decode()
        return {"Proxy-Authorization": "Basic " + user} if self.user or self.password else {}


DEFAULT_PORTS = {"http": 80, "https": 443, "redis": 6379, "rediss": 6379, "unix": 0}
HOST_SHAPE = (  # and a port from 1 to 65535
    r"(?P<host>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::0*(?P<port>[1-9][0-9]{0,3}|[1-5][0-9]{4}"
    "|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]))?")


def to_endpoint(match):
    parts = defaultdict(str, match.groupdict(""))
    scheme = parts["scheme"] or "http"
    user, password = [urllib.parse.unquote(parts[name]) for name in ("user", "password")]
    return Endpoint(scheme, parts["host"].strip("[]"), int(parts["port"] or DEFAULT_PORTS[scheme]),
                    parts["path"].rstrip("/"), user, password)


def endpoints(text):
    addresses = listed(pattern(
        "(?P<scheme>https?)://" + HOST_SHAPE + "(?P<path>(?:/[A-Za-z0-9._~%@:+-]*)*)",
        "must be http://HOST[:PORT][/PATH] or https://..., without user, query or fragment",
        to_endpoint))(text)
    require(len(set(addresses)) == len(addresses), "must not name the same address twice")
    return addresses


def read_network(text):
    """Returns a network; a lone address is a network of one, and IPv4 in the form of IPv6 becomes
    IPv4."""
    try:
        network = ipaddress.ip_network(text)
    except ValueError:
        raise ValueError("must be addresses or networks such as 10.0.0.0/8 or ::1,"
                         " separated by commas") from None
    mapped = getattr(network[0], "ipv4_mapped", None)
    if mapped:
        network = ipaddress.ip_network((mapped, network.prefixlen - 96))
    require(network.prefixlen, "must not be all addresses: anyone could say for whom it calls")
    return network


def printable(text):
    require(text.isprintable(), "must be one line of printable text")
    return text


def ca_file(text):
    try:
        ssl.create_default_context(cafile=text)
    except (OSError, ValueError):
        raise ValueError("must be a file of certificates in PEM that can be read") from None
    return text


NEVER_SET = ("host|content-length|transfer-encoding|connection|te|trailer|upgrade|expect"
             "|keep-alive")
HAS_OTHER_MEANING = NEVER_SET + (
    "|origin|cookie2?|user-agent|accept(-.*)?|content-.*|authorization|proxy-.*|anthropic-.*"
    "|access-control-.*|openai-.*|x-(goog-)?api-key|x-request-id|x-forwarded-for|x-llm-proxy-.*")

model_globs = listed(pattern(
    "[!-+.-~-]+", "must be models such as gpt-*, separated by commas, none empty"))
web_origins = word_or({"*": ("*",), "off": ()}, listed(pattern(
    "(?i)(local|[a-z][a-z0-9+.-]*://[!-.0-~]+)/?", "must be *, off, or local and origins such as"
    " https://chat.example.org or https://*.example.org, by commas",
    lambda match: re.sub(  # as browsers spell it (RFC 6454 6.2)
        "^(http:.*):80$|^(https:.*):443$", r"\1\2", match[1].lower()))))
# Those that this process may use before it is pinned to one
CPUS = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
redis_server = pattern(
    "(?P<scheme>rediss?)://(?:(?P<user>[!-9;-?A-~]*):(?P<password>[!-?A-~]*)@)?" + HOST_SHAPE
    + "(?P<path>/[0-9]{0,3})?", "must be redis://[USER:PASSWORD@]HOST[:PORT][/DB], rediss://... or"
    " unix:///PATH", to_endpoint)
unix_socket = pattern("(?P<scheme>unix)://(?P<path>/[!-~]{1,100})", "must be unix:///PATH",
                      to_endpoint)


def redis_url(text):
    return unix_socket(text) if text.startswith("unix:") else redis_server(text)


# 'alice=sk-1, sk-2' -> {'sk-1': 'alice', 'sk-2': None}; what stands before the first '=' is a name
# if it can be one. What looks like the next of a list is no part of a key.
proxy_keys = word_or({"anyone": {}}, mapping(
    "(?!.*[;|&:](?:sk-|[A-Za-z]{2}[A-Za-z0-9_.@-]*=[^=]))"
    "(?:([A-Za-z0-9_.@-]{1,64})=(?!=*$)|(?!.*=))((?!\\[?[\"'])[!-~]+)",
    "must be keys or name=key, separated by commas (not by ; | & or :), none empty, without spaces"
    " and quotes; a key with = in it needs a name",
    lambda match: match.group(2, 1), "must not name the same key twice"))


def model_aliases(text):
    """'fast=gemma4, smart=gpt-5' -> {'fast': 'gemma4', 'smart': 'gpt-5'}."""
    aliases = mapping(
        r"([^=]+?)\s*=\s*(.+)", "must be alias=model, separated by commas, each alias once",
        lambda match: (printable(match[1]), printable(match[2])))(text)
    require(aliases.keys().isdisjoint(aliases.values()), "must not make an alias of an alias")
    return aliases


def header_lines(text):
    """'Name: value | Name: value' -> {'name': 'Name: value'}."""
    return dict(listed(pattern(
        f"(?!(?i:{NEVER_SET}):)([A-Za-z0-9_-]+): *([ -~]*)",
        "must be 'Name: value', several with | between, and nothing that frames a message",
        lambda match: (match[1].lower(), "%s: %s" % match.groups())), "|")(text))


web_address = pattern("https?://" + HOST_SHAPE + "(/[!-~]*)?",
                      "must be http://HOST[:PORT][/PATH] or https://...")


# Money is counted in whole picodollars: a price of $0.000001 per million tokens is one a token.
PICODOLLARS = 10 ** 12
NANODOLLAR = 1000  # picodollars; in Redis, whose numbers are doubles, money is in the former
UNITS = "requests tokens input_tokens output_tokens usd running estimate".split()
UNITS_OF_CALLS = ("requests", "running")  # every call costs these
ANEW = 1 << 80  # a refill that fills any bucket
DURATIONS = {word: int(seconds) for word, seconds in table_of("""
    second 1
    minute 60
    hour 3600
    day 86400
    week 604800
    month 2592000
    s 1
    m 60
    h 3600
    d 86400""").items()}
SCOPE_SHAPE = r"(each|all|address|(key|team|model|upstream):[^\s,]{1,200})"
AMOUNT_SHAPE = "(?=.*[1-9])[0-9]{1,12}"
USD_SHAPE = r"(?=.*[1-9])[0-9]{1,6}(\.[0-9]{1,6})?"
ZONE_SHAPE = "[A-Za-z0-9_+/-]{1,64}"
JOINED_SCOPES = "(all|(address)?,?(caller)?),?(model)?,?(team)?,?(upstream)?"


class Rule(NamedTuple):
    """One limit, as a kind of bucket: it holds `capacity`, gains `refill` every `interval` seconds;
    the capacity is None where the rule says `unlimited`. A bucket of calls that are `running` gains
    nothing: its interval is endless. `scopes` are (kind, glob) pairs, `unit` is
    an index into UNITS, and `rate` is (amount, seconds) as the rule has it, for people. Of the
    rules of one `family` only the first that matches a call counts. A `window` is one of a fixed
    length ("window"), or a "day", "week" or "month" in a `zone`: then `refill` is ANEW. In a Level
    such a calendar's rule has the length of one period, and when it `began`, in unix seconds."""
    text: str
    scopes: Tuple[Tuple[str, str], ...]
    unit: int
    capacity: Optional[int]
    refill: int
    interval: float
    rate: Tuple[int, int]
    family: Tuple[Any, ...] = ()
    window: str = ""
    zone: str = ""
    began: int = 0

    @property
    def word(self) -> str:
        """The unit for people: an estimate is one of tokens."""
        return UNITS[self.unit].replace("estimate", "tokens")


def rules(text, scope=""):
    """'SCOPE AMOUNT UNIT per DURATION [burst N]', '... per DURATION window', '... per calendar
    PERIOD [in ZONE]' or 'SCOPE AMOUNT running', by semicolons or lines; `scope` is that of all
    where none is said."""
    require(not (scope and re.search(rf"(^|[;\n])\s*{SCOPE_SHAPE}", text)), "must be rules"
            " without a scope, such as '60 requests per minute': they count for this key alone")
    rows = [scope + " ".join(row.split()) for row in re.split("[;\n]", text) if row.strip()]
    parsed = list(map(read_rule, rows))
    require(parsed, "must hold at least one rule such as 'each 60 requests per minute'")
    require(len(set(parsed)) == len(parsed), "must not hold the same rule twice")
    return parsed


def read_rule(text):
    scope, amount, unit, length, kind, burst, zone = read_words(text)
    scopes = tuple(part.partition(":")[::2] for part in scope.split(","))
    kinds = sorted("caller" if kind in ("each", "key") else kind for kind, _ in scopes)
    require_word(re.fullmatch(JOINED_SCOPES, ",".join(kinds)), text, scope,
                 "scopes that can be joined")
    require_zone(zone)
    window = kind.replace("burst", "")
    rate, capacity = count_units(amount, unit), count_units(burst or amount, unit)
    interval = read_duration(kind if zone else length) if length else inf
    grain = NANODOLLAR if unit == "usd" else 1
    # A bucket gains this at a time, every 1 ms or more: clocks are no finer.
    refill = max(1, rate // (interval * 1000 * grain)) * grain
    return Rule(text, scopes, UNITS.index(unit), None if amount == "unlimited" else capacity,
                ANEW if window else refill, interval if window else interval * refill / rate,
                (rate, interval), (tuple(kinds), unit, interval, window), window, zone)


def read_words(text):
    """Returns the words of a rule that say something, "" for those that it does not have. Raises
    ValueError that names the first word which is wrong."""
    words = text.split(" ")
    number = USD_SHAPE if words[2:3] == ["usd"] else AMOUNT_SHAPE
    rest = iter(words)

    def word(shape, right):
        value = next(rest, "")
        require_word(re.fullmatch(shape, value), text, value, right)
        return value

    scope = word(f"{SCOPE_SHAPE}(,{SCOPE_SHAPE})*",
                 "each, all, address, key:GLOB, team:GLOB, model:GLOB or upstream:GLOB")
    amount = word(number + "|unlimited",
                  "an amount above 0, of at most 12 digits (usd: 6), or unlimited")
    unit = word("|".join(UNITS[:6]),
                "requests, tokens, input_tokens, output_tokens, usd or running")
    length = kind = burst = zone = ""
    if unit != "running":
        word("per", "per")
        length = word(
            "second|minute|hour|day|week|month|[1-9][0-9]{0,5}[smhd]|calendar",
            "second, minute, hour, day, week, month, such as 30s, 5m, 12h, 7d, or calendar")
        if length == "calendar":
            kind, zone = word("day|week|month", "day, week or month"), "UTC"
            if word("(in)?", "in ZONE or the end"):
                zone = word(ZONE_SHAPE, "a time zone such as Europe/Berlin")
        else:
            kind = word("(burst|window)?", "burst N, window or the end")
            burst = word(number, "an amount above 0") if kind == "burst" else ""
    word("", "the end")
    return scope, amount, unit, length, kind, burst, zone


def require_word(good, text, word, right):
    require(good, "must be rules such as 'each 60 requests per minute', with ; between;"
            " in '%s' %s should be %s" % (text, f"the word '{word}'" if word else "the end", right))


def count_units(amount, unit):
    """Returns an amount, of money in picodollars; what is unlimited counts as 1: no bucket is made
    of it."""
    scale = PICODOLLARS if unit == "usd" else 1
    return int(Decimal(amount.replace("unlimited", "1")) * scale)


def read_duration(word):
    return DURATIONS.get(word) or int(word[:-1]) * DURATIONS[word[-1]]


def time_zone(name: str) -> Optional[datetime.tzinfo]:
    """Returns the time zone of this name, None where this machine does not know it."""
    # No such name, a folder of names, or a file that is no time zone
    with suppress(OSError, ValueError, LookupError):
        if re.fullmatch(ZONE_SHAPE, name):
            return datetime.timezone.utc if name == "UTC" else zoneinfo.ZoneInfo(name)
    return None


def require_zone(name):
    missing = "" if time_zone("Europe/Berlin") else (
        ": this machine has no time zone data, install its package tzdata")
    require(not name or time_zone(name), "must name time zones that are known here, which"
            f" '{name}' is not{missing}")


age = pattern("[1-9][0-9]{0,5}[sm]|[1-9][0-9]{0,4}h|[1-9][0-9]{0,3}d",
              "must be such as 15m, 12h or 30d, and at most 9999d",
              lambda match: read_duration(match[0]))


def read_amount(text, unit):
    """Returns an amount of a unit, of money in picodollars."""
    shape = USD_SHAPE if unit == "usd" else AMOUNT_SHAPE
    require(unit in UNITS[:5] and re.fullmatch(shape, text), "must be an amount above 0, such as 2,"
            " of requests, tokens, input_tokens, output_tokens or usd")
    return count_units(text, unit)


# What a tier costs, times the price, where a price does not say: OpenAI's and Google's service
# tiers, Anthropic's speed and inference_geo.
USUAL_TIERS = {name: Decimal(factor) for name, factor in table_of("""
    flex 0.5
    batch 0.5
    priority 2
    fast 2
    ultrafast 6
    us 1.1""").items()}


class Price(NamedTuple):
    """Picodollars a token; the last three are for input that a cache gave, took, or took for an
    hour. A prompt of more than `above_tokens` costs what `above` says, all of it. `tiers` are
    {what a response says of how it was served: a factor, or the price there}."""
    input: int
    output: int
    cache_read: int
    cache_write: int
    hour_write: int
    above_tokens: int = 1 << 62
    above: Optional["Price"] = None
    tiers: Dict[str, Union[Decimal, "Price"]] = {}

    def times(self, factor: Decimal) -> "Price":
        values = [round(value * factor) for value in self[:5]]
        return Price(*values, self.above_tokens, self.above and self.above.times(factor),
                     self.tiers)

    def in_tier(self, name: str) -> "Price":
        """Returns the price in a tier; of one that nobody knows, this one."""
        tier = self.tiers.get(name, USUAL_TIERS.get(name))
        if isinstance(tier, Price):
            return tier._replace(tiers=self.tiers)
        return self.times(tier) if tier is not None else self


def read_price(cost: JsonObject) -> Price:
    """{input, output, cache_read, cache_write, hour_write}, each in USD per million tokens, above:
    {tokens, input, output ...}, tiers: {name: factor or {input, output ...}} -> Price. A cached
    token costs what any other input does, and one that is kept for an hour twice that, unless the
    table says otherwise."""
    usual = cost["input"]
    costs = {"output": 0, "cache_read": usual, "cache_write": usual, "hour_write": 2 * usual,
             **cost}
    values = [costs[name] for name in Price._fields[:5]]
    above = cost.get("above")
    tiers = {name.casefold(): read_price(tier) if isinstance(tier, dict) else Decimal(tier)
             for name, tier in cost.get("tiers", {}).items()}
    factors = [tier for tier in tiers.values() if not isinstance(tier, Price)]
    require(all(0 <= value < 1_000_000 for value in values + factors), "not a price")
    price = Price(*[round(value * 1_000_000) for value in values], tiers=tiers)
    if above:
        return price._replace(above_tokens=int(above["tokens"]), above=read_price(above))
    return price


# Providers that resell models of others come last.
MAKERS = "openai anthropic google deepseek mistral xai moonshotai zai minimax alibaba".split()


def makers_costs(providers):
    """{provider: {models: {id: {cost: {...}}}}} -> {id: cost}. Many sell a model under the same
    name, some for nothing: its maker's price counts, else the first that is not 0."""
    order = [*MAKERS, *providers]
    rows = [(name.casefold(), makers_cost(model))
            for provider in sorted(providers, key=order.index)
            for name, model in providers[provider]["models"].items() if "cost" in model]
    rows.sort(key=lambda row: not any(read_price(row[1])[:5]))
    costs = {}
    for name, cost in rows:
        costs.setdefault(name, cost)
    return dict(reversed(costs.items()))  # of two spellings the maker's price counts, too


def makers_cost(model):
    """Returns the cost of a model as `read_price` takes it; models.dev says from which size of the
    context on it is higher, and which option of a request costs more."""
    cost = {**model["cost"], "tiers": {}}
    sizes = [{**row, "tokens": row["tier"]["size"]} for row in model["cost"].get("tiers", ())]
    if not sizes and "context_over_200k" in cost:
        sizes = [{**cost["context_over_200k"], "tokens": 200_000}]
    for row in sorted(sizes, key=lambda row: -row["tokens"]):
        cost["above"] = {**row, "above": cost.get("above"), "tiers": {}}
    for name, mode in model.get("experimental", {}).get("modes", {}).items():
        options = mode.get("provider", {}).get("body", {}).values()
        if "cost" in mode:
            cost["tiers"].update(dict.fromkeys([name, *map(str, options)], makers_cost(mode)))
    return cost


def price_file(path):
    """Returns {glob: Price} of models.dev's api.json or of {model glob: {input, output, ...}}."""
    try:
        with open(path, encoding="utf-8") as file:
            table = json.load(file, parse_float=Decimal)
        if any("models" in row for row in table.values()):
            table = makers_costs(table)
        return {name: read_price(cost) for name, cost in table.items()}
    except OSError as failure:
        raise ValueError(f"must be a file that can be read: {failure.strerror}") from None
    except (ValueError, TypeError, AttributeError, KeyError, ArithmeticError, RecursionError):
        raise ValueError("must be a JSON file of prices, as models.dev has it or as"
                         " {model: {input, output}}") from None


def flat_price(text):
    usd = number_between(0, 999_999, Decimal, r"[0-9]{1,6}(\.[0-9]{1,6})?",
                         "must be refuse, allow, or USD per million tokens, below a million")(text)
    return read_price({"input": usd, "output": usd, "hour_write": usd})


PASSTHROUGH = "passthrough"
DIALECT_NAMES = "openai anthropic gemini azure ollama".split()
VENDORS = table_of("""
    openai https://api.openai.com/v1
    anthropic https://api.anthropic.com/v1
    gemini https://generativelanguage.googleapis.com
    deepseek https://api.deepseek.com/v1
    grok https://api.x.ai/v1
    mistral https://api.mistral.ai/v1
    groq https://api.groq.com/openai/v1
    openrouter https://openrouter.ai/api/v1
    ollama http://localhost:11434""")
PARSER = getattr(re, "_parser", None) or re.sre_parse  # Python 3.10
COMPILER = getattr(re, "_compiler", None) or re.sre_compile
TAKE_ONE = "LITERAL", "NOT_LITERAL", "ANY", "IN"
REPEAT = "MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"
ARE_GROUPS = "SUBPATTERN", "ATOMIC_GROUP"


class Rest(NamedTuple):
    """What follows a place in an expression: the characters that it may begin with, the steps that
    it may need, and (characters, least, most) of its parts: how often each takes one of these."""
    begin: FrozenSet[str] = frozenset()
    steps: int = 0
    takes: Tuple[Tuple[FrozenSet[str], int, int], ...] = ()

    def may_take(self, characters):
        return sum(most for one, _, most in self.takes if not characters.isdisjoint(one))

    def may_take_rounds(self, begin, taken):
        """Tells how many rounds of the repetition before it this could take itself: the `begin` of
        each round, and all that it must have of `taken`."""
        return min([self.may_take(begin & self.begin) - 1,
                   *(self.may_take(one) for one, least, _ in taken if least)])


class LinearPattern:
    """A regular expression that searches any text in linear time. Python's parser reads it, and it
    is judged from its end to its begin: where a repetition may go on or end, what follows must be
    short, or unable to take what another round would. This is checked beforehand because a search
    cannot be stopped, and holds all threads."""
    LONGEST = 300        # characters
    MOST_ROUNDS = 64     # rounds of an unlimited repetition, and steps after it
    MOST_OF_GROUPS = 16  # rounds of an unlimited group of several characters
    MOST_CHOICES = 3     # choices whose branches begin alike
    MOST_WITHIN = 4      # repetitions, one within the other: each is judged twice
    MOST_STEPS = 2500    # of a search from one character
    SURE_MATCH = 1024    # characters of a match that is always found whole
    # A letter, a digit, a space and a sign of other scripts, and some of the last ones
    OTHERS = "\u0436\u0663\u3000\u2030\U00020000\U0001d7d8\U0001f600"

    def __init__(self, text: str):
        """Raises ValueError, whose message says what is wrong."""
        require(len(text) <= self.LONGEST, f"must have {self.LONGEST} characters at most")
        try:
            self.tree = PARSER.parse(text)
        except (re.error, OverflowError, RecursionError) as fault:
            raise ValueError(f"must be a regular expression: {fault}") from None
        require(not re.search(r"\\[uUN]", text), "must have letters as they are, for \\u or \\N")
        require(self.tree.getwidth()[0], "must not match an empty text")
        self.flags = re.IGNORECASE if re.search("[(][?][a-zA-Z]*i", text) else 0
        self.alphabet = {*map(chr, range(256)), *self.OTHERS, *text}
        self.alphabet.update([chr(min(ord(one) + 1, sys.maxunicode)) for one in text])
        self.choices = 0
        steps = self.judge(self.tree, Rest(), 0).steps
        require(steps <= self.MOST_STEPS, "must have fewer or shorter repetitions")
        self.longest = min(self.tree.getwidth()[1], self.SURE_MATCH)
        self.compiled = COMPILER.compile(self.tree)

    def judge(self, parts, after: Rest, repeated) -> Rest:
        """Judges parts that stand before `after`, within so many repetitions. What has no limit
        would take quadratic time, and gets one."""
        for place in reversed(range(len(parts))):
            op, value = parts[place]
            if op.name in TAKE_ONE:
                taken = self.characters(parts[place])
                after = Rest(taken, after.steps + 1, ((taken, 1, 1), *after.takes))
            elif op.name in REPEAT:
                parts[place] = op, self.limited(*value)
                after = self.judge_repetition(*parts[place][1], after, repeated)
            elif op.name == "BRANCH":
                after = self.judge_choice(value[1], after, repeated)
            elif op.name in ARE_GROUPS:
                inner = value if isinstance(value, PARSER.SubPattern) else value[-1]
                after = self.judge(inner, after, repeated)
            else:
                require(op.name == "AT", f"must not look around or back: {op.name.lower()}")
        return after

    def characters(self, part):
        one = COMPILER.compile(PARSER.SubPattern(self.tree.state, [part]), self.flags)
        return frozenset(filter(one.fullmatch, self.alphabet))

    def limited(self, least, most, inner):
        if most == PARSER.MAXREPEAT:
            most = self.MOST_ROUNDS if inner.getwidth() == (1, 1) else self.MOST_OF_GROUPS
        require(least <= most <= self.MOST_ROUNDS,
                f"must not repeat more than {self.MOST_ROUNDS} times")
        require(most < 2 or inner.getwidth()[0], "must not repeat what may be empty")
        return least, most, inner

    def judge_repetition(self, least, most, inner, after, repeated):
        last = self.judge(inner, after, repeated + (most > 1))
        taken = last.takes[:len(last.takes) - len(after.takes)]  # by one round
        begin = last.begin | after.begin
        rest = Rest(begin, after.steps + (last.steps - after.steps) * most, (
            *((one, low * least, high * most) for one, low, high in taken), *after.takes))
        if most > 1:
            require(repeated < self.MOST_WITHIN, "must have fewer repetitions of repetitions")
            self.judge(inner, rest, repeated + 1)  # before its next round
        # In `\d+-` no round can go to what follows; in `\d{1,3}\d{4}` two can, each of which has 4
        # steps tried anew; in `\d+\d+` 63, with 64 steps each, which is refused.
        open_rounds = min(most - least, after.may_take_rounds(last.begin, taken))
        if open_rounds > 0:
            steps = after.steps * (open_rounds + 1)
            require(steps <= (0 if repeated else self.MOST_ROUNDS),
                    "must not have repetitions, one soon after the other, that can take the same")
            rest = rest._replace(steps=rest.steps + steps)
        return rest._replace(begin=last.begin) if least else rest

    def judge_choice(self, ways, after, repeated):
        rests = [self.judge(way, after, repeated) for way in ways]
        begin = frozenset().union(*[one.begin for one in rests])
        alike = sum(len(one.begin) for one in rests) > len(begin)
        self.choices += alike
        require(self.choices <= (0 if repeated else self.MOST_CHOICES),
                "must not have many choices that begin alike, nor repeat one")
        taken = [(characters, 0, most) for one in rests
                 for characters, _, most in one.takes[:len(one.takes) - len(after.takes)]]
        steps = [one.steps for one in rests]
        return Rest(begin, sum(steps) if alike else max(steps), (*taken, *after.takes))


def fault_of(expression):
    """Returns what is wrong with a LinearPattern, "" where nothing is."""
    try:
        LinearPattern(expression)
    except ValueError as fault:
        return str(fault)
    return ""


def linear_patterns(text):
    """'order=ORD-[0-9]+; ...', or such lines -> {'order': LinearPattern}."""
    patterns = {}
    for row in re.split("\n" if "\n" in text else ";", text):
        name, _, expression = map(str.strip, row.partition("="))
        require(expression and re.fullmatch("[a-z][a-z0-9_]{0,30}", name) and name not in (
            *REDACTED, *patterns), "must be name=regex, by lines or ;, each name once")
        try:
            patterns[name] = LinearPattern(expression)
        except ValueError as fault:
            begins = itertools.accumulate(expression)
            part = next(one for one in begins if fault_of(one) == str(fault))
            raise ValueError(f"is at fault: {name} {fault}, as in {part}") from None
    return patterns


REDACTED = "email card iban phone ssn ip secrets".split()
# Countries that are alike in how phone numbers are written at home
PHONE_COUNTRIES = (
    "CA PR US",
    "AR AT AU BE BG BR CH DE EG FI FR GB HR ID IE IL IN IT JP KR MY NG NL NZ PH PK RO RS SE SI SK"
    " TH TR TW UA VN ZA",
    "CZ ES GR PL PT",
    "DK NO SG")
read_name = pattern("[A-Za-z0-9_.@-]{1,64}", "must be 1 to 64 of A-Z a-z 0-9 _ . @ -")
redacted_kinds = listed(one_of(*REDACTED))
read_kinds = word_or({"off": ()}, redacted_kinds)
# The APIs that have their own paths beside /v1, and hosts of Azure.
BESIDE_V1 = ("azure", "ollama")
AZURE_HOST = re.compile(r"[^.]+\.(openai|cognitiveservices|services\.ai)\.azure\.com", re.I)
# Names that no upstream may have, and why: its paths begin with its name, as do some of our own and
# of the APIs.
RESERVED = {
    "": "", "base": "; the base is set by BASE_API_URL, BASE_API_KEY ...",
    **{name: f": /{name} is a path of its own" for name in (
        "v1 v1beta health healthz readyz admin dashboard me models metrics chat completions"
        " messages responses embeddings rerank generations images audio files threads").split()}}


class UpstreamConfig(NamedTuple):
    """The settings of one upstream; each field but the name is that of a variable."""
    name: str
    url: Sequence[Endpoint]
    key: Optional[str] = None
    models: Sequence[str] = ()
    model: Optional[str] = None
    dialect: Optional[str] = None
    max_concurrency: int = 0
    headers: Texts = {}


READERS = {
    "addresses": endpoints,
    "proxy": pattern(
        "(?:http://)?(?:(?P<user>[!-.0-9;-~]*)(?::(?P<password>[!-.0-~]*))?@)?" + HOST_SHAPE
        + "/?", "must be http://[USER:PASSWORD@]HOST[:PORT]", to_endpoint),
    "redis": redis_url,
    "URL": web_address,
    "public URL": pattern("https?://" + HOST_SHAPE + "/?",
                          "must be http://HOST[:PORT] or https://...",
                          lambda match: match[0].rstrip("/")),
    "host": pattern(r"\[?([^][]+)\]?", "must be an address, or a name, to listen on",
                    lambda match: printable(match[1])),
    "networks": listed(read_network),
    "origins": web_origins,
    "key": pattern("(?![\"'])[!-~]+", "must be visible ASCII without spaces and quotes"),
    "keys": proxy_keys,
    "weights": mapping(  # 'alice=3, bob=2' -> {'alice': 3, 'bob': 2}
        r"([^=]+?)\s*=\s*([1-9][0-9]{0,2})",
        "must be name=weight, separated by commas, each name once, weights from 1 to 999",
        lambda match: (match[1], int(match[2]))),
    "models": model_globs,
    "aliases": model_aliases,
    "dialect": one_of(*DIALECT_NAMES),
    "field": pattern(
        "(?!(?i:%s)$)[A-Za-z0-9-]{1,64}" % HAS_OTHER_MEANING,
        "must be the name of a header field that means nothing else",
        lambda match: match[0].lower()),
    "fields": listed(pattern(
        "[A-Za-z0-9*-]{1,64}", "must be names of header fields such as X-Trace-*, by commas",
        lambda match: match[0].lower())),
    "header lines": header_lines,
    "headers": mapping(
        "([A-Za-z0-9_-]+) *= *([!-~]*)", "must be name=value, separated by commas",
        lambda match: (match[1], printable(urllib.parse.unquote(match[2], "latin-1")))),
    "rules": rules,
    "own rules": partial(rules, scope="each "),
    "name": read_name,
    "age or never": word_or({"never": None}, age),
    "upstream": pattern("[a-z0-9_]{1,64}", "must be the name of an upstream, or base"),
    "shares": listed(pattern(  # '80%' -> 0.8
        "([1-9][0-9]?|100)%", "must be shares such as 80%, separated by commas",
        lambda match: int(match[1]) / 100)),
    "prices": price_file,
    "unpriced": word_or({"refuse": "refuse", "allow": "allow"}, flat_price),
    "redacted": redacted_kinds,
    "redacted or off": read_kinds,
    "upstreams": listed(pattern(
        "[a-z0-9_*?]+", "must be names of upstreams such as openai or azure*, by commas")),
    "patterns": linear_patterns,
    "values": listed(pattern(
        "[!-+.-~-]+", "must be what may leave, such as *@example.com, by commas, none empty")),
    "countries": listed(one_of(*" ".join(PHONE_COUNTRIES).split())),
    "certificates": ca_file,
    "CPU": word_or({"auto": -1, "off": None}, number_between(
        0, 9999, message="must be auto, off or the number of a CPU")),
    "prefix": pattern("[A-Za-z0-9_.:-]{1,64}",
                      "must be 1 to 64 letters, digits and _ . : -"),
    "text": printable}


class Setting:
    """One row of SETTING_TABLE. The function `read` turns a text into a value; the message of its
    ValueError says what would be right ("must be ...")."""

    def __init__(self, variable: str, kind: str, sentence: str):
        kind, _, secret = kind.partition(", ")
        self.name, _, default = variable.partition("=")
        self.default = default or None
        self.read = reader_of(kind)
        self.sentence = " ".join(sentence.split())
        self.secret = bool(secret)


def reader_of(kind):
    """Returns the reader of a kind of value: one of several words, a number (of seconds) from one
    to another, or one of READERS."""
    if "|" in kind:
        return one_of(*kind.split("|"))
    least, dots, most = kind.partition("..")
    if kind.endswith(" s"):
        return number_between(least, most[:-2], float, r"[0-9]{1,9}(\.[0-9]{1,6})?",
                              "must be a number of seconds between {} and {}")
    return number_between(least, most) if dots else READERS[kind]


# Groups of settings; of each its NAME or NAME=default, the kind of its value, and a sentence for
# --help and README. UPSTREAM_NAME_KEY stands for UPSTREAM_OPENAI_KEY and all others.
SETTING_TABLE = """\
Where calls go
BASE_API_URL: addresses
    URL of the endpoint, or of several that do the same, by commas; its path replaces the call's
    leading /v1
BASE_API_KEY: key, secret
    its key, which callers never see; passthrough: each caller sends its own
BASE_MODEL: text
    replaces the model that metered calls to it ask for; /v1/models lists no other
MODEL_ALIASES: aliases
    other names for models, such as fast=gemma4,smart=gpt-5, for routes, limits and prices
UPSTREAM_ORDER: models
    order in which named upstreams are tried, by commas; the rest as in .env, then by name
OPEN_TIMEOUT=10: 0.1..3600 s
    seconds to connect to an upstream
FIRST_BYTE_TIMEOUT: 0.1..86400 s
    seconds to wait for the first byte of a response; unset: READ_TIMEOUT
READ_TIMEOUT=600: 0.1..86400 s
    seconds to wait between two bytes of a response
MAX_CALL_SECONDS=0: 0..1000000 s
    seconds after which a call is cut; 0: never; keep it above FIRST_BYTE_TIMEOUT
BREAKER_FAILURES=5: 1..1000000
    failures in a row after which an address gets no more calls
BREAKER_SECONDS=30: 0.1..86400 s
    seconds until one call tries such an address again
UPSTREAM_RETRIES=0: 0..10
    how often a 429 or 503 whose Retry-After is 5 s or less is asked again
PASS_HEADERS: fields
    more header fields of callers to pass on, such as X-Trace-*, by commas
UPSTREAM_CA_FILE: certificates
    certificates (PEM) to check https upstreams against, instead of the system's
UPSTREAM_TLS_VERIFY=on: on|off
    off: certificates are not checked, so that anybody in between can read all
HTTPS_PROXY: proxy, secret
    http://[USER:PASSWORD@]HOST[:PORT] of a proxy to https upstreams, by CONNECT
NO_PROXY: text
    hosts to reach without that proxy, by commas

One more upstream, whose paths begin with /NAME
UPSTREAM_NAME_URL: addresses
    its URL, as BASE_API_URL; not needed for %(vendors)s
UPSTREAM_NAME_KEY: key, secret
    its key; passthrough: each caller sends its own and is known by it
UPSTREAM_NAME_MODELS: models
    models that it serves on paths without /NAME, such as gpt-*,o3
UPSTREAM_NAME_MODEL: text
    replaces the model that calls to it ask for
UPSTREAM_NAME_DIALECT: dialect
    its API, one of %(dialects)s; unset: the vendor's, else openai
UPSTREAM_NAME_MAX_CONCURRENCY=0: 0..1000000
    as MAX_CONCURRENCY, which is for BASE_API_URL
UPSTREAM_NAME_HEADERS: header lines, secret
    header fields to send to it, as Name: value, several with | between

Before a busy upstream
MAX_CONCURRENCY=0: 0..1000000
    metered calls that the endpoint runs at once; more wait in a fair queue; 0: no limit
MAX_QUEUE=100: 0..100000
    calls that may wait in the queues; more get a 503
MAX_QUEUE_PER_CALLER=20: 0..100000
    calls of one caller that may wait; more get a 503
QUEUE_SECONDS=30: 0.1..86400 s
    seconds that a call may wait, in all queues together; then it gets a 503
KEY_WEIGHTS: weights
    turns in the queue, such as alice=3,bob=2, for names in PROXY_API_KEYS; others have 1
STREAM_COMMENT_SECONDS=0: 0..86400 s
    a stream whose caller has heard nothing for so many seconds gets a comment, so that no
    client gives up; 0: off

Where callers come in
HOST: host
    address to listen on; 127.0.0.1: for this machine alone; ::, for IPv6 and IPv4; unset:
    0.0.0.0, but 127.0.0.1 where anyone could spend our key at a vendor
PORT=8899: 1..65535
    port to listen on
PROXY_API_KEYS: keys, secret
    keys that may call, as key or name=key, by commas; unset, or anyone: all may
MAX_BODY_BYTES=33554432: 1..1099511627776
    largest body of a call that is read; uploads of files may have any size
MAX_TEXT_BYTES=8388608: 1..1073741824
    largest body without its images and the like
MAX_CONNECTIONS=1024: 1..65535
    connections of callers at once; more get a 503, or with TLS are closed
MAX_CONNECTIONS_PER_ADDRESS: 1..65535
    connections of one address (of IPv6, a /64); unset: 256, and any number from this machine
TLS_CERT_FILE: text
    certificates (PEM) to serve https with, TLS 1.2 or newer; read again on SIGHUP
TLS_KEY_FILE: text
    key of TLS_CERT_FILE, if it is not in that file
TRUSTED_PROXIES: networks
    proxies in front of this one, addresses or networks by commas, whose X-Forwarded-For and
    CALLER_HEADER are believed
CALLER_HEADER: field
    field in which trusted proxies name the caller, such as X-OpenWebUI-User-Id; they must set
    it
DRAIN_SECONDS=30: 0..86400 s
    seconds that running calls have after a signal to stop
CORS_ORIGINS: origins
    web pages that may call: *, off, or origins and local (this network's, and extensions), by
    commas; unset: local, and * where keys are asked for

What a caller may use
MAX_TOKENS=10: 1..1000000000000
    tokens that a caller's bucket holds; it starts full
REFILL_TOKENS=2: 1..1000000000000
    tokens that the bucket gains every interval
REFILL_INTERVAL_SECONDS=300: 1..1000000000
    seconds of that interval
TOKEN_COST_MODE=request: request|estimate|usage
    a call costs a fixed number (request), its estimated tokens, or those it used (usage)
REQUEST_TOKEN_COST=1: 1..1000000000000
    the fixed number, for TOKEN_COST_MODE=request
RESPONSE_TOKEN_RESERVE=256: 0..1000000000000
    output tokens to expect of a call that names no maximum
IMAGE_TOKENS=1000: 0..1000000000
    tokens to expect of an image, sound or file in a prompt
LIMITS: rules
    rules instead of that one bucket: SCOPE AMOUNT UNIT per DURATION [burst N or window], or
    SCOPE N running; ...
LIMIT_MESSAGE=limit reached, wait {wait}: text
    what the assistant says to a limited caller; also {rule}, {limit}, {unit}, and {me}, the
    page where it sees what it used
LIMIT_REPLY=assistant: assistant|error|auto
    assistant: it says so; error: a 429; auto: a 429 for programs, the assistant for people
PRICES: prices
    JSON file of prices, in USD per million tokens
UNPRICED=refuse: unpriced
    what a usd rule does with a model that has no price: refuse; allow, for nothing; or a
    number, its price in USD per million tokens

What is passed on
UNKNOWN_CALLS=count: count|pass|refuse
    calls of endpoints that are not known here: they cost a request and wait in the queue
    (count), are free (pass), or get a 403 (refuse)
STORED: pass|own|refuse
    files, batches, responses and all else that endpoints store: each caller has what it made
    (own), all have all (pass), or nobody has any (refuse); unset: own where keys are asked for,
    else pass
VENDOR_ADMIN_PATHS=off: on|off
    on: also paths that manage an endpoint, such as /api/pull, or hand out credentials

What must not leave
REDACT: redacted
    what is looked for in calls before they go to a vendor, by commas: %(redacted)s; unset:
    nothing
REDACT_MODE=mask: mask|block|report
    mask: placeholders stand for it at the vendor, and it stands in the answer again; block: the
    call gets a 400; report: it is only counted
REDACT_UPSTREAMS: upstreams
    upstreams that it must not reach, such as openai,azure*; unset: all but those with addresses
    of this machine or a private network
REDACT_PATTERNS: patterns
    what else to look for, as name=regex by lines or ;, without lookaround, back references and
    repetitions of the same, one after or within the other
REDACT_ALLOW: values
    values that may leave all the same, such as *@example.com
REDACT_COUNTRY: countries
    countries, such as US,DE, whose phone numbers are found without + as well
REDACT_ANSWERS=off: on|off
    on: such values in answers are masked as well, unless the call held them
REDACT_OPAQUE=pass: pass|refuse
    what cannot be searched, such as a file or a conversation that is kept upstream: pass, or
    refuse by a 400

What is remembered
DATABASE=llm_proxy.db: text
    SQLite file of calls and buckets; off: they are kept in memory alone
LEDGER_DAYS=90: 1..36500
    days that a call stays in DATABASE
USAGE_LOG: text
    file to append a JSON line to for each call; -: stdout

Who may look and steer
ADMIN_KEY: key, secret
    key of /dashboard and /admin/api, which may change things; unset, and no stored key of that
    role: a new one at each start, told on the terminal or in a file beside DATABASE
VIEWER_KEY: key, secret
    key that may look at the same, and change nothing
METRICS=keys: keys|open
    keys: /metrics asks for a viewer's or an admin's key; open: for none
PUBLIC_URL: public URL
    URL by which callers reach this proxy, for links such as {me} in LIMIT_MESSAGE
WARN_AT: shares
    shares of a limit in tokens or usd, such as 80%% or 50%%,90%%, at which to warn
WEBHOOK_URL: URL, secret
    URL that gets a POST of JSON for each warning
OTEL_EXPORTER_OTLP_ENDPOINT: URL
    URL of an OpenTelemetry collector; a span for each call goes to its /v1/traces
OTEL_EXPORTER_OTLP_HEADERS: headers, secret
    header fields for that collector, as name=value, by commas
OTEL_SERVICE_NAME=llm_proxy: text
    name of this service at that collector

What several processes share
REDIS_URL: redis, secret
    Redis or Valkey that holds the buckets of all: redis://[USER:PASSWORD@]HOST[:PORT][/DB],
    rediss://... by TLS, or unix:///PATH
REDIS_CA_FILE: certificates
    certificates (PEM) to check rediss:// against, instead of the system's
REDIS_PREFIX=llm_proxy: prefix
    what the names of keys in Redis begin with: one for each installation
REDIS_AWAY=share: share|open|closed
    while Redis is away: each process has its share of every limit (share), there are no limits
    (open), or calls get a 503 (closed)
PEERS=1: 1..10000
    processes that share the limits, until Redis has told how many there are; at least WORKERS
SHARE_SLOTS: on|off
    on: MAX_CONCURRENCY is that of all processes together; unset: on with WORKERS
WORKERS=1: 1..64
    processes that share the port; more than one need REDIS_URL, and a system with fork

How it runs
LOG_FORMAT=text: text|json
    form of the lines on stderr, one per call: text for people, json for programs
CPU_AFFINITY=auto: CPU
    CPU to stay on (Linux): a number, auto (the port picks one) or off; workers take those that
    follow
DEMO_FIRST_MS=0: 0..86400000
    milliseconds until an answer of --demo begins
""" % {"vendors": ", ".join(VENDORS), "dialects": ", ".join(DIALECT_NAMES),
       "redacted": ", ".join(REDACTED)}


def read_settings(group):
    """Returns the settings in a group of SETTING_TABLE."""
    return [Setting(*row) for row in re.findall(r"(.+): (.+)\n((?: {4}.+\n?)+)", group)]


SETTINGS = {group.partition("\n")[0]: read_settings(group)
            for group in SETTING_TABLE.split("\n\n")}
SETTINGS_BY_NAME = {setting.name: setting for group in SETTINGS.values() for setting in group}
DEFAULTS = {name: setting.default for name, setting in SETTINGS_BY_NAME.items()
            if not name.startswith("UPSTREAM_NAME_")}
DEFAULT_DATABASE = DEFAULTS["DATABASE"]
UPSTREAM_VARIABLE = re.compile(
    "^UPSTREAM_([A-Z0-9_]*?)_(%s)$" % "|".join(UpstreamConfig._fields[1:]).upper())
# Old names, which go on working
RENAMED = dict.fromkeys(("STREAM_HEARTBEAT_SECONDS", "EARLY_STREAM_SECONDS"),
                        "STREAM_COMMENT_SECONDS")


def find_setting(name):
    """Returns the setting of a variable: UPSTREAM_NAME_KEY of UPSTREAM_OPENAI_KEY."""
    return SETTINGS_BY_NAME.get(UPSTREAM_VARIABLE.sub(r"UPSTREAM_NAME_\2", name))


# Settings for security: whoever misspells one believes that it is on.
GUARDS = """PROXY_API_KEYS LIMITS CORS_ORIGINS TRUSTED_PROXIES TLS_CERT_FILE TLS_KEY_FILE
    REDACT REDACT_MODE REDACT_UPSTREAMS REDACT_OPAQUE""".split()
OPENSSL_FILE = "SSL_CERT_FILE"  # is set on many machines, and is not TLS_CERT_FILE misspelt


def meant_by(name, near=0.8):
    """Returns the setting that a misspelt name probably means, None without one; whatever is near
    to one for security means that."""
    name = name.upper()
    return next(chain(
        [guard for guard in GUARDS if len(name) > 4 and name in guard],
        difflib.get_close_matches(name, GUARDS, 1, 0.8),
        difflib.get_close_matches(name, SETTINGS_BY_NAME, 1, near)), None)


def unknown_setting(name):
    if name in RENAMED:
        return f"{name} is now {RENAMED[name]}"
    meant = meant_by(name)
    return f"{name} is not a setting" + f": did you mean {meant}?" * bool(meant) + (
        " NOTHING IS GUARDED BY THIS" * (meant in GUARDS))


def parse_ip(host):
    """Returns an IP address, of IPv4 where one was mapped into IPv6. Raises ValueError."""
    ip = ipaddress.ip_address(host.partition("%")[0])
    return getattr(ip, "ipv4_mapped", None) or ip


def is_external(host: str) -> bool:
    """Tells whether a host is outside of this machine and its network, as far as its name says."""
    try:
        return parse_ip(host).is_global
    except ValueError:
        return "." in host and not host.endswith((".local", ".localhost", ".lan"))


NOT_A_BASE = re.compile("//|/(chat/)?completions$|/messages$|/responses$|/models$")


class Config(types.SimpleNamespace):
    """The values of SETTINGS, by lower-case name; those without a default are None where they are
    unset. `texts` is {variable: its text}; `unknown` are variables that are no settings."""
    keys_are_stored = False  # keys of DATABASE at the start: nobody else may call
    admin_key_file = ""  # of a key that was made, and ends with the process
    reread: Callable[[], "Config"]  # while a proxy runs: how to read the settings again

    @property
    def all_upstreams(self) -> List[UpstreamConfig]:
        """All upstreams: the base first, if it is set."""
        base = UpstreamConfig("base", self.base_api_url, self.base_api_key, model=self.base_model,
                              dialect=usual_dialect("base", self.base_api_url or ()),
                              max_concurrency=self.max_concurrency)
        return ([base] if base.url else []) + self.upstreams

    @property
    def all_rules(self) -> List[Rule]:
        """LIMITS, else the plain settings as a rule: whole intervals, several tokens each."""
        if self.limits:
            return self.limits
        units = {"request": "requests", "estimate": "estimate", "usage": "tokens"}
        rate = self.refill_tokens, self.refill_interval_seconds
        text = "each %d tokens per %ds burst %d" % (*rate, self.max_tokens)
        unit = units[self.token_cost_mode]
        return [Rule(text, (("each", ""),), UNITS.index(unit), self.max_tokens, *rate, rate,
                     (("caller",), unit, rate[1], ""))]

    # What a running proxy can go by without a new start.
    RELOADED = set_of("""
        PROXY_API_KEYS KEY_WEIGHTS LIMITS LIMIT_MESSAGE LIMIT_REPLY PRICES UNPRICED MAX_TOKENS
        REFILL_TOKENS REFILL_INTERVAL_SECONDS TOKEN_COST_MODE REQUEST_TOKEN_COST
        RESPONSE_TOKEN_RESERVE IMAGE_TOKENS REDACT REDACT_MODE REDACT_UPSTREAMS REDACT_ALLOW
        REDACT_PATTERNS REDACT_COUNTRY REDACT_ANSWERS REDACT_OPAQUE""")

    def take(self, new: "Config") -> List[str]:
        """Takes what may change while it runs; returns the names of what else was changed. Raises
        ConfigFaults where that would open a door without a word."""
        if self.proxy_api_keys and new.proxy_api_keys is None:
            raise ConfigFaults("PROXY_API_KEYS must not be unset while it runs: anyone opens the"
                               " door to all")
        new.choose_defaults(self.keys_are_stored)
        for name in self.RELOADED:
            self.texts[name] = new.texts[name]
            setattr(self, name.lower(), getattr(new, name.lower()))
        return [name for name in sorted({*self.texts, *new.texts})
                if self.texts.get(name) != new.texts.get(name)]

    def choose_defaults(self, keys_are_stored: bool):
        """Sets what is not set and depends on other settings, and on whether callers have keys in
        DATABASE."""
        self.keys_are_stored = keys_are_stored
        keyed = self.keys_are_asked_for
        self.host_is_narrowed = self.texts["HOST"] is None and self.pays_for_anyone()
        usual = {"HOST": "127.0.0.1" if self.host_is_narrowed else "0.0.0.0",
                 "STORED": "own" if keyed else "pass",
                 # Without keys, any page opened here could call.
                 "CORS_ORIGINS": ("*",) if keyed else ("local",)}
        for name, value in usual.items():
            if self.texts[name] is None:
                setattr(self, name.lower(), value)

    def texts_in_use(self) -> Iterator[Tuple[str, Optional[str]]]:
        """Yields variables and what may be shown of their texts."""
        chosen = {"HOST": self.host, "STORED": self.stored,
                  "CORS_ORIGINS": ",".join(self.cors_origins) or "off"}
        for name, text in {**self.texts, **chosen}.items():
            yield name, "set, not shown" if text and find_setting(name).secret else text

    def is_open(self) -> bool:
        """Tells whether other machines, or proxies on this one, may call without a key."""
        is_loopback = self.host in ("localhost", "::1") or self.host.startswith("127.")
        return self.proxy_api_keys is None and not self.keys_are_stored and (
            not is_loopback or bool(self.trusted_proxies))

    def pays_for_anyone(self):
        """Tells whether anybody who reaches the port would spend the operator's key at a vendor,
        though PROXY_API_KEYS is not `anyone`."""
        return self.proxy_api_keys is None and not self.keys_are_asked_for and any(
            upstream.key and url.scheme == "https" and is_external(url.host)
            for upstream in self.all_upstreams for url in upstream.url)

    def origin(self, host: str) -> str:
        """Returns where callers reach this proxy by the name of its host."""
        return Endpoint("https" if self.tls_cert_file else "http", host, self.port, "").origin

    @property
    def keys_are_asked_for(self) -> bool:
        """Tells whether callers are told apart by keys: ours, or their own for an upstream."""
        own = self.keys_are_stored if self.proxy_api_keys is None else self.proxy_api_keys
        return bool(own) or any(
            upstream.key == PASSTHROUGH for upstream in self.all_upstreams)

    def inbound_keys(self) -> List[str]:
        """Returns the keys in the settings by which callers and admins come in."""
        return [*(self.proxy_api_keys or ()), *filter(None, (self.admin_key, self.viewer_key))]

    def own_keys(self) -> FrozenSet[str]:
        """Returns the keys of ours and of callers that stand in the settings."""
        ours = {upstream.key for upstream in self.all_upstreams}
        return frozenset(ours.union(self.inbound_keys()) - {None, PASSTHROUGH})

    def redacted_upstreams(self) -> FrozenSet[str]:
        """Returns the names of the upstreams that redacted values must not reach."""
        globs = self.redact_upstreams
        return frozenset(one.name for one in self.all_upstreams if (
            any(fnmatch.fnmatchcase(one.name, glob) for glob in globs) if globs
            else any(is_external(url.host) for url in one.url)))

    def speaks_https(self) -> bool:
        """Tells whether any upstream is reached by TLS."""
        return any(url.scheme == "https"
                   for upstream in self.all_upstreams for url in upstream.url)

    def warnings(self) -> List[str]:
        """Returns sentences about what is allowed, but probably a mistake."""
        names = [upstream.name for upstream in self.all_upstreams]
        reserve = self.response_token_reserve
        return [
            *map(unknown_setting, self.unknown),
            *(f"the rule '{rule.text}' speaks of no upstream there is: {', '.join(names)}"
              for rule in self.all_rules for kind, glob in rule.scopes
              if kind == "upstream" and not fnmatch.filter(names, glob)),
            *(f"RESPONSE_TOKEN_RESERVE {reserve} is above what '{rule.text}' holds: a call that"
              " names no max_tokens can never be let in" for rule in self.all_rules
              if rule.word in ("tokens", "output_tokens") and reserve > (rule.capacity or inf)),
            *(f"KEY_WEIGHTS speaks of '{name}', which no key in PROXY_API_KEYS is named"
              for name in self.key_weights or ()
              if name not in (self.proxy_api_keys or {}).values() and not self.keys_are_stored),
            *self.mistakes(), *self.doubts()]

    def mistakes(self):
        """Yields the warnings that speak of one value."""
        for upstream in self.all_upstreams:
            for match in filter(None, [NOT_A_BASE.search(url.path) for url in upstream.url]):
                yield (f"the URL of {upstream.name} has {match[0]} in its path: a base is what"
                       " stands before that, such as http://127.0.0.1:8000/v1")
        keys = [(f"the key {name or 'without a name'} in PROXY_API_KEYS", key)
                for key, name in (self.proxy_api_keys or {}).items()]
        for name, key in (*keys, ("ADMIN_KEY", self.admin_key), ("VIEWER_KEY", self.viewer_key)):
            if key and len(key) < 16:
                yield name + " has less than 16 characters: it can be guessed"
        if (self.redact or self.redact_patterns) and not self.redacted_upstreams():
            yield "REDACT takes nothing out: no upstream is far from here (REDACT_UPSTREAMS)"

    def doubts(self):
        """Returns the warnings about all settings together, each once at most."""
        prefix = next((one.name for one in self.upstreams), "NAME")
        rows = (
            (not self.base_api_url and not any(one.models for one in self.upstreams),
             f"only paths with a prefix, such as /{prefix}/v1, lead anywhere: neither BASE_API_URL"
             " nor UPSTREAM_..._MODELS is set"),
            (self.upstream_tls_verify == "off",
             "certificates of https upstreams are not checked (UPSTREAM_TLS_VERIFY=off): whoever is"
             " in between reads all, keys included"),
            (0 < self.max_call_seconds <= (self.first_byte_timeout or self.read_timeout),
             "MAX_CALL_SECONDS ends calls before FIRST_BYTE_TIMEOUT (unset: READ_TIMEOUT) does: an"
             " upstream that is silent never counts as failing"),
            (self.caller_header and not self.trusted_proxies,
             "CALLER_HEADER is believed from nobody: TRUSTED_PROXIES is unset"),
            (self.host_is_narrowed,
             "it listens on this machine alone, because anyone could spend the key of a vendor: set"
             " PROXY_API_KEYS (to keys, or to anyone) or HOST to open it"),
            (self.is_open() and not self.host_is_narrowed,
             "callers are not checked: whoever reaches this port can call, and every invented key"
             " has a bucket of its own (PROXY_API_KEYS is unset)"),
            (self.unknown_calls == "count" and not self.counts_requests(),
             "calls of unknown endpoints cost a request (UNKNOWN_CALLS=count), and no rule counts"
             " requests: of these calls, what names no tokens is free"),
            (self.may_ignore_models(),
             "a rule names models or counts money, and BASE_MODEL is unset: where the endpoint"
             " answers any name with its one model, callers choose what the rule sees"),
            (not self.limits and self.token_cost_mode == "request"
             and self.request_token_cost > self.max_tokens,
             f"REQUEST_TOKEN_COST {self.request_token_cost} is above MAX_TOKENS {self.max_tokens}:"
             " no call can ever be let in"))
        return [sentence for holds, sentence in rows if holds]

    def may_ignore_models(self):
        """Tells whether rules depend on models, and the base, which is no vendor's, may ignore
        them."""
        by_model = [rule for rule in self.all_rules
                    if UNITS[rule.unit] == "usd" or "model" in dict(rule.scopes)]
        hosts = {endpoints(url)[0].host for url in VENDORS.values()} - {"localhost"}
        return by_model and not self.base_model and any(
            url.host not in hosts for url in self.base_api_url or ())

    def counts_requests(self):
        """Tells whether a call without any tokens costs something."""
        return any(UNITS[rule.unit] in (*UNITS_OF_CALLS, "estimate") for rule in self.all_rules)

    def contradictions(self):
        """Yields faults of settings that are right one by one, and wrong together."""
        has_redis = self.texts["REDIS_URL"]
        workers = self.workers or 1
        keys = self.inbound_keys()
        rows = (
            (not self.texts["BASE_API_URL"] and not self.upstreams,
             "BASE_API_URL is not set. Start like this:"
             "  BASE_API_URL=http://127.0.0.1:8000/v1 python llm_proxy.py  (or try --demo)"),
            ("{me}" in (self.limit_message or "") and not self.public_url,
             "LIMIT_MESSAGE must not name {me} where PUBLIC_URL is not set"),
            (self.share_slots == "on" and not has_redis,
             "SHARE_SLOTS must be off without REDIS_URL (got 'on')"),
            (workers > 1 and not (has_redis and hasattr(os, "fork")),
             f"WORKERS must be 1 without REDIS_URL, or on a system without fork (got '{workers}')"),
            (len(set(keys)) < len(keys),
             "ADMIN_KEY and VIEWER_KEY must be keys of their own, not set elsewhere, too"),
            (self.tls_key_file and not self.tls_cert_file, "TLS_KEY_FILE needs TLS_CERT_FILE"))
        yield from [sentence for holds, sentence in rows if holds]
        first = self.cpu_affinity
        if CPUS and first not in (None, -1):
            for one in {*range(first, first + workers)}.difference(CPUS):
                yield f"CPU_AFFINITY must be a CPU this process may use (got '{one}')"
        yield from self.faults_of_upstreams()
        yield from self.faults_of_tls()

    def faults_of_upstreams(self):
        names = [upstream.name for upstream in self.upstreams]
        for name in self.upstream_order or ():
            if name not in names:
                among = ", ".join(names) or "named upstreams"
                yield f"UPSTREAM_ORDER must be among {among} (got '{name}')"
        for name, text in self.texts.items():
            if self.proxy_api_keys and name.endswith("_KEY") and text == PASSTHROUGH:
                yield (f"{name} must not be passthrough where PROXY_API_KEYS is set: a caller"
                       " shows one key only")

    def faults_of_tls(self):
        try:
            if self.tls_cert_file:
                server_context(self.tls_cert_file, self.tls_key_file)
        except (OSError, ValueError) as failure:
            yield ("TLS_CERT_FILE and TLS_KEY_FILE must be a certificate and its key, not"
                   f" encrypted: {failure}")


def server_context(certificates: str, key: Optional[str]) -> ssl.SSLContext:
    """Returns the context for callers' TLS. Raises OSError, ValueError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # Nobody needs renegotiation, and it makes writes wait for reads.
    context.options |= getattr(ssl, "OP_NO_RENEGOTIATION", 0)
    # Without a password an encrypted key asks for one on a terminal that is not there.
    context.load_cert_chain(certificates, key, password=lambda: "")
    return context


class ConfigFaults(Exception):
    """Everything that is wrong with the settings, one line each."""


DOTENV_ROW = re.compile(  # a line, or several where the value is in quotes
    r"""[ \t]*(?:#.*|(?:export[ \t]+)?([A-Za-z_][A-Za-z0-9_]*)[ \t]*="""
    r"""(?:[ \t]*"([^"]*)"|[ \t]*'([^']*)'|(?![ \t]*["'])(.*?))(?:[ \t]+#.*)?)?[ \t]*(?:\n|\Z)""")


def read_dotenv(text: str) -> Tuple[Texts, List[str]]:
    """Returns (values, faults) of NAME=value lines with `export `, # comments and quotes, which
    may hold lines."""
    values = {}
    faults = []
    text = re.sub("\r\n?", "\n", text)
    position = 0
    while position < len(text):
        match = DOTENV_ROW.match(text, position)
        if match:
            position = match.end()
            if match[1]:
                values[match[1]] = match[match.lastindex]
        else:
            faults.append(f".env line {text.count(chr(10), 0, position) + 1} is not NAME=value;"
                          " a value that begins with a quote must end with the next one")
            position = text.find("\n", position) + 1 or len(text)
    return values, faults


def looks_like_a_setting(name):
    """Tells whether a variable of the environment may be a setting that is misspelt."""
    return name in RENAMED or name.startswith("UPSTREAM_") or (
        not name.upper().endswith("_PROXY") and meant_by(name, 0.9))


def set_variables(environ, written):
    """Returns {variable: text}; the environment wins over `.env`, and an empty text is unset."""
    rows = [*written.items(),
            ("HTTPS_PROXY", environ.get("https_proxy", "")),
            ("NO_PROXY", environ.get("no_proxy", "")),
            *sorted(environ.items())]
    variables = {name: text.strip() for name, text in rows if text.strip()}
    for old, name in RENAMED.items():
        if old in variables:
            variables.setdefault(name, variables[old])
    return variables


def shown_value(text, secret=False):
    """Returns what a message may tell of a value."""
    hidden = secret or re.search(r"@|-----|\bsk-|(?i:key=)", text)
    return "a value not shown here" if hidden else repr(text)


def read_values(texts, faults):
    """Returns {variable: value}. Adds to `faults` what is wrong with one; its value is None."""
    values = dict.fromkeys(texts)
    for name, text in texts.items():
        setting = find_setting(name)
        try:
            values[name] = text and setting.read(text)
        except ValueError as fault:
            faults.append(f"{name} {fault} (got {shown_value(text, setting.secret)})")
    return values


def read_upstreams(values, faults):
    """Returns the upstreams that variables name, as UPSTREAM_ORDER has them, then in the order of
    the variables. Adds to `faults` what is wrong with one."""
    options = defaultdict(dict)
    for variable, value in values.items():
        match = UPSTREAM_VARIABLE.fullmatch(variable)
        if match:
            options[match[1].lower()][match[2].lower()] = value
    order = [*(values["UPSTREAM_ORDER"] or ()), *options]
    upstreams = []
    for name in sorted(options, key=order.index):
        try:
            upstreams.append(named_upstream(name, options[name]))
        except ValueError as fault:
            faults.append(f"UPSTREAM_{name.upper()}_{fault}")
    return upstreams


def named_upstream(name, options):
    """{'key': 'sk-1'} -> UpstreamConfig. Raises ValueError, whose message begins with what must be
    set after UPSTREAM_NAME_."""
    require(name not in RESERVED, "%s must have another name%s" % (
        next(iter(options)).upper(), RESERVED.get(name)))
    if name in VENDORS:
        options.setdefault("url", endpoints(VENDORS[name]))
    require("url" in options, "URL is not set; only these need none: " + ", ".join(VENDORS))
    urls = options["url"] = options["url"] or ()
    dialect = options.setdefault("dialect", usual_dialect(name, urls) or "openai")
    require(dialect not in BESIDE_V1 or not any(
        url.path.endswith(("/v1", "/openai")) for url in urls),
        f"URL must end before /v1 and /openai: DIALECT={dialect} has paths beside them")
    return UpstreamConfig(name, **options)


def usual_dialect(name, urls):
    """Returns the default API of an upstream: its vendor's, None where that is unknown. Below a
    path, Azure and Ollama have nothing but OpenAI's."""
    own_paths = not any(url.path for url in urls)
    if own_paths and urls and all(AZURE_HOST.fullmatch(url.host) for url in urls):
        return "azure"
    return name if name in DIALECT_NAMES and (own_paths or name not in BESIDE_V1) else None


def read_config(environ: Texts, dotenv: str = "") -> Config:
    """Returns the settings. Raises ConfigFaults with all faults at once."""
    written, faults = read_dotenv(dotenv)
    variables = set_variables(environ, written)
    texts = {**DEFAULTS, **{name: text for name, text in variables.items() if find_setting(name)}}
    values = read_values(texts, faults)
    config = Config(
        texts=texts,
        unknown=[name for name in variables if name not in (OPENSSL_FILE, *texts) and (
            name in written or looks_like_a_setting(name))],
        upstreams=read_upstreams(values, faults),
        **{name.lower(): values[name] for name in DEFAULTS})
    config.choose_defaults(False)
    if not config.speaks_https():  # it is for other programs then, of any kind
        config.https_proxy = texts["HTTPS_PROXY"] = None
        faults = [fault for fault in faults if not fault.startswith("HTTPS_PROXY")]
    faults += config.contradictions()
    faults += [".env: " + unknown_setting(name) for name in config.unknown
               if name in written and (faults or meant_by(name) in GUARDS)]
    if faults:
        raise ConfigFaults("\n".join(faults))
    return config


# --------------------------------------------------------------------------------------------------
# Refusals: every way to say no. A Refusal is raised at any depth, so no step can forget to stop,
# and rendered in one place. Its class says what callers and the log are told; messages are
# constant. It does not know what an error looks like on the wire.
# --------------------------------------------------------------------------------------------------

class Refusal(Exception):
    """Why a call gets no answer of an upstream."""
    status = 400
    outcome = "refused"               # for the log
    code: Optional[str] = None
    close_after = False               # the framing of the connection is lost, or it must end
    message = "The request was refused"
    cause: Optional[str] = None       # for the operator alone
    nothing_sent = False              # nothing of the call went upstream: another one may be asked
    body: Optional[bytes] = None      # the upstream's own words, where they are known
    fields: JsonObject = {}           # more header fields of the reply

    def __init__(self, message: str = "", wait: Optional[float] = None, **attributes: Any):
        """`wait`: in so many seconds it may be asked again."""
        super().__init__(message or self.message)
        vars(self).update(attributes, wait=wait)
        if wait is not None:
            self.fields = {"Retry-After": max(1, ceil(wait)), **self.fields}


class BadRequest(Refusal):
    """What came is no HTTP, or no call that could be understood."""


class Malformed(BadRequest):
    """Bytes from either side that are not HTTP/1.1 as RFC 9112 has it; whose fault they are is for
    their reader to say."""
    message = "The request is not valid HTTP/1.1"
    close_after = True


class HeadTooLarge(Malformed):
    message = "The request head is too large"


class BrokenBody(BadRequest):
    message = "The request body is not framed as its head says"
    close_after = True


class UnsupportedEncoding(Refusal):
    status = 415
    message = "The body of a metered call must be sent as it is, or compressed by gzip or deflate"
    fields = {"Accept-Encoding": "gzip, deflate"}  # RFC 9110 15.5.16


class UnsupportedExpectation(Refusal):
    status = 417
    message = "The only expectation understood is 100-continue"


class Forbidden(Refusal):
    """The caller is known, and nobody may have what it asks for."""
    status = 403
    message = "This path is not passed on"


class NotForCalls(Forbidden):
    code = "key_not_for_calls"
    message = "This key is for looking at this proxy and steering it: it makes no calls"


class RoleTooLow(Forbidden):
    code = "role_too_low"
    message = "This key may not do that here"


class ModelNotAllowed(Forbidden):
    code = "model_not_allowed"
    message = "This key may not use the model, or the call names none"


class UpstreamNotAllowed(Forbidden):
    code = "upstream_not_allowed"
    message = "This key may not use the upstream"


class MustNotLeave(Refusal):
    """The call holds values that must not go to this upstream; another one may get them."""
    code = "must_not_leave"
    nothing_sent = True

    def __init__(self, description: str):
        super().__init__("The request holds what must not leave (REDACT): " + description)


class CannotBeRead(Refusal):
    code = "cannot_be_read"
    nothing_sent = True
    message = ("The request holds, or is about, what cannot be searched for what must not leave"
               " (REDACT_OPAQUE)")


class NothingStored(Refusal):
    status = 404
    message = "Nothing of this name is stored here for this caller"


class NoSuchPage(Refusal):
    status = 404
    message = "There is no such page: GET /admin/api lists them all"


class BooksAway(Refusal):
    status = 503
    message = "The database cannot be read or written now"


class MethodNotAllowed(Refusal):
    status = 405
    message = "The method is not passed on"


class UpgradeRequired(Refusal):
    """A WebSocket is asked for. RFC 9110 15.5.22 wants the answer to name a protocol that is
    spoken."""
    status = 426
    message = "WebSocket is not spoken here, post the call over HTTP/1.1 instead"
    fields = {"Upgrade": "HTTP/1.1", "Connection": "upgrade"}


class Unauthorized(Refusal):
    status = 401
    code = "invalid_api_key"
    message = "Missing or invalid proxy API key"
    fields = {"WWW-Authenticate": "Bearer", "x-should-retry": "false"}  # Claude Code asked 11 times


class TooManyGuesses(Refusal):
    """Many wrong keys from one address, perhaps of somebody who tries them all."""
    status = 429
    code = "too_many_wrong_keys"
    message = "Too many wrong keys came from this address, wait a minute"
    fields = {"x-should-retry": "false"}


class ForeignOrigin(Refusal):
    status = 403
    code = "origin_not_allowed"
    message = "Web pages of this origin may not call: CORS_ORIGINS names those that may"


class RequestTimeout(Refusal):
    status = 408
    close_after = True
    message = "The request did not arrive in time"


class BodyTooLarge(Refusal):
    status = 413
    message = "The request body is larger than this proxy accepts"


class TextTooLarge(BodyTooLarge):
    message = "The text in the request body is larger than this proxy accepts (MAX_TEXT_BYTES)"


class Overloaded(Refusal):
    status = 503
    close_after = True
    message = "The proxy is busy, try again in a moment"


class Stopped(Overloaded):
    """The server stops, and the time for running calls is over."""
    outcome = "stopped"


class InternalError(Refusal):
    status = 500
    outcome = "internal_error"
    close_after = True
    message = "The proxy failed to handle this request"


OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class UpstreamFailed(Refusal):
    """The words of `failure`, or for it if it is an exception, go to the log and never to a caller.
    `broke_before_response` says that the connection ended before a proper response began."""
    status = 502
    outcome = "upstream_failed"
    message = "The upstream could not be reached or did not answer properly"

    def __init__(self, failure: Union[Exception, str], nothing_sent: bool = False):
        cause = CAUSES.get(type(failure), "connection failed")
        super().__init__(
            nothing_sent=nothing_sent, cause=failure if isinstance(failure, str) else cause,
            broke_before_response=isinstance(failure, OSError)
            and failure.errno not in OUT_OF_RESOURCES)


CAUSES = {
    ConnectionRefusedError: "connection refused",
    ConnectionResetError: "connection reset",
    BrokenPipeError: "connection reset",
    ConnectionAbortedError: "closed without an answer",
    socket.gaierror: "name not found",
    ssl.SSLCertVerificationError: "certificate not trusted",
    ssl.SSLError: "TLS failed",
    Malformed: "answer is not HTTP"}


class KeyRefused(Refusal):
    """The upstream refuses the operator's key, which is not the caller's fault."""
    status = 502
    outcome = "upstream_status"
    code = "upstream_refused_our_key"
    cause = "status 401"
    message = "The upstream refused the key of this proxy: its operator must look at it"


class UpstreamTimeout(Refusal):
    status = 504
    outcome = "upstream_failed"
    cause = "timed out"
    message = "The upstream did not answer in time"
    broke_before_response = False


class BreakerOpen(Refusal):
    """Every address that could be asked has failed too often."""
    status = 503
    outcome = "upstream_failed"
    cause = "breaker open"
    nothing_sent = True
    message = "The upstream is failing, try again in a moment"
    fields = {"X-LLM-Proxy-Error-Class": "upstream_open"}


class QueueRefused(Refusal):
    """The queue before the upstream is too long, or did not move in time."""
    status = 503
    nothing_sent = True
    message = "The upstream is busy and the queue before it is long, try again in a moment"

    def __init__(self, cause: str):
        super().__init__(cause=cause, fields={
            "Retry-After": 5, "X-LLM-Proxy-Error-Class": cause.replace(" ", "_")})


class NotAStream(Refusal):
    """The response is no stream, but the caller's stream has begun; `body` is the error in the
    upstream's words."""
    status = 502
    outcome = "upstream_status"
    message = "The upstream did not answer with a stream"


class NoRoute(Refusal):
    status = 404
    code = "model_not_found"

    def __init__(self, model: Optional[str], **attributes: Any):
        what = f"the model '{model}'" if model else "this path"
        super().__init__("No upstream serves " + what, **attributes)


class NoPrice(Refusal):
    """What a call will cost is unknown, and a rule counts money."""
    status = 403
    code = "model_has_no_price"
    message = ("The model has no price here, and a limit counts money: PRICES or UNPRICED can give"
               " it one")


class LimitReached(Refusal):
    """A bucket is short. Without `wait` the call costs more than the bucket ever holds. `tightest`
    is as in a Hold: the bucket as it is without the call."""
    status = 429
    outcome = "limited"
    code = "rate_limit_exceeded"

    def __init__(self, message: str, wait: Optional[float], short: "Level"):
        super().__init__(message, wait, cause=short.rule.text, tightest=short.untaken())


class LimitsAway(Refusal):
    status = 503
    code = "limits_away"
    message = "The limits cannot be looked up now, try again in a moment"
    fields = {"Retry-After": 1}
    nothing_sent = True


class CallerGone(Exception):
    """The caller hung up: nobody is left to answer."""
    outcome = "caller_gone"
    nothing_sent = False  # to the upstream


# --------------------------------------------------------------------------------------------------
# Callers: the one place that decides who is calling. Keys are known by digest and compared in
# constant time. Elsewhere a raw key is seen only to show an upstream the caller's own, and to tell
# a new one once. A stored key says what it may use; that it holds to that is for others to see.
# --------------------------------------------------------------------------------------------------

CREDENTIAL_FIELDS = ("authorization", "x-api-key", "x-goog-api-key")
AZURE_CREDENTIAL_FIELD = "api-key"  # one more, where an upstream is Azure's
# in X-Forwarded-For: [IPv6] or IPv4, both with or without a port, or a bare IPv6
FORWARDED_ADDRESS = re.compile(
    r"\s*(?:\[([^]]+)\](?::\d+)?|([\d.]+)(?::\d+)?|([0-9A-Fa-f:.]+(?:%[\w.]+)?))\s*")
Fields = Mapping[str, str]  # header fields, by name in lower case
CallerKey = Tuple[str, Union[bytes, str]]  # ('key', SHA-256 of a credential), ('address', IP)


def split_query(query):
    """Returns the keys in a query, as Google's clients may send them, and the rest of it."""
    keys = []
    rest = []
    for part in query.split("&"):
        name, _, value = [urllib.parse.unquote_plus(one, "latin-1") for one in part.partition("=")]
        if name.strip().lower() == "key":
            keys.append(value)
        else:
            rest.append(part)
    return keys, "&".join(rest)


def address_of(host: str) -> str:
    """Returns what stands for the owner of an address: of IPv6 its /64, which is what one customer
    has (RFC 6177). All neighbours share the link-local /64, so there the whole address counts."""
    if ":" not in host:
        return host
    ip = parse_ip(host)
    if ip.version == 4 or ip.is_loopback or ip.is_link_local:
        return str(ip)
    return str(ipaddress.ip_network((ip, 64), strict=False))


ROLES = ("caller", "viewer", "admin")  # the later one may do all that the former may, but call
STEERING = ROLES[1:]


class Key(NamedTuple):
    """What is known of a stored key but its secrets. Times are in seconds since 1970. `globs` and
    `rules` are what `models` and `limits` say. `subject` is whose bucket it has: it outlives the
    secrets, and is the digest of the first one."""
    name: str
    role: str = "caller"
    team: Optional[str] = None
    created: float = 0.0
    expires: Optional[float] = None
    disabled: bool = False
    models: Optional[str] = None
    upstream: Optional[str] = None
    limits: Optional[str] = None
    redact: Optional[str] = None
    tag: Optional[str] = None
    note: Optional[str] = None
    last_used: Optional[float] = None
    subject: bytes = b""
    globs: Sequence[str] = ()
    rules: Tuple[Rule, ...] = ()

    def __hash__(self):
        return hash(self.subject)

    def as_dict(self) -> JsonObject:
        """Returns what may be shown of it."""
        return dict(zip(self._fields[:-3], self))


# What can be said of a key, in the form of SETTING_TABLE
KEY_FIELDS = {field.name: field for field in read_settings("""\
role: caller|viewer|admin
    caller: makes calls; viewer, admin: for /dashboard and /admin/api
team: name
    its team, for rules such as team:NAME
expires: age or never
    how long it is good from when it was made, such as 15m or 30d; never
models: models
    the only models that it may use, such as 'gemma*,gpt-4*'
limits: own rules
    rules without a scope, such as '2 usd per day', each instead of the general one of its unit and
    duration
upstream: upstream
    the only upstream that its calls go to
redact: redacted or off
    what must not leave with its calls, as REDACT, instead of that; off
tag: name
    a word to add up usage by
note: text
    a line for people""")}


@lru_cache(20_000)
def read_key(*values: Any) -> Key:
    """Returns a key of what is stored of it. Raises ValueError or TypeError for what somebody else
    has written."""
    key = Key(*values)
    derived = {name: field.read(getattr(key, name)) for name, field in KEY_FIELDS.items()
               if name != "expires" and (getattr(key, name) is not None or name == "role")}
    times = [key.created, key.expires or 0, key.last_used or 0]
    require(read_name(key.name) and key.disabled in (0, 1) and len(bytes(key.subject)) == 32
            and all(0 <= one < 1e11 for one in times), "no key")
    return key._replace(disabled=bool(key.disabled), globs=derived.get("models", ()),
                        rules=tuple(derived.get("limits", ())))


class Caller:
    """A person or program that calls. `key` finds its bucket. It says what it is, so a bearer that
    spells an IP is not that IP. `key_name` is what PROXY_API_KEYS calls the key, or its name where
    it is stored; people may share one. `label` is for logs: a name, the address, or key:1a2b3c4d, a
    digest against which nobody can test guesses without `secret`. `role` is None where the key is
    none that was given out. `until`: when that ends, in seconds since 1970. `origin` is who counts
    where anyone may invent a key."""
    __slots__ = "key name key_name label role team tag stored_key until origin".split()

    def __init__(self, key: CallerKey, name: Optional[str], secret: bytes = b"",
                 key_name: Optional[str] = None, role: Optional[str] = None,
                 stored_key: Optional[Key] = None, until: Optional[float] = None,
                 origin: Optional[CallerKey] = None):
        self.key = key
        self.origin = origin or key
        self.name = name
        self.key_name = key_name
        self.label = name or "key:" + hashlib.blake2b(key[1], digest_size=4, key=secret).hexdigest()
        self.role = role
        self.stored_key = stored_key
        self.team = stored_key and stored_key.team
        self.tag = stored_key and stored_key.tag
        self.until = until

    def __repr__(self):
        return f"<Caller {self.label}>"


Known = Dict[bytes, Tuple[bytes, Caller]]  # blinded digest of a secret -> that digest, and whose


def digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("latin-1")).digest()


def new_secret() -> str:
    return "sk-" + base64.urlsafe_b64encode(os.urandom(32)).decode().rstrip("=")


def blinded(credential: bytes, secret: bytes) -> bytes:
    """Returns a digest by which a table can be searched: nobody can predict that of a guess, so the
    time that a search takes tells them nothing."""
    return hashlib.blake2b(credential, key=secret).digest()


class StoredKeys:
    """The keys of DATABASE as they were when they were read: in `rows`. `closed`: nobody else may
    call. `disabled` are names of upstreams. `faults` are sentences about what could not be read."""
    rows: Optional[Tuple[Any, ...]] = None
    disabled: Sequence[str] = ()
    faults: Sequence[str] = ()

    def __init__(self, secret: bytes, keys: Sequence[Key] = (),
                 secrets: Sequence[Tuple[bytes, str, Optional[float]]] = (), closed: bool = False):
        """`secrets` are (digest, name of the key, valid until). One of a key that cannot be read
        lets nobody in, not even where anyone may call."""
        self.closed = closed
        self.keys = {key.name: key for key in keys}
        self.rules = {key.subject: key.rules for key in keys}
        self.known: Known = {}
        for one, name, valid_until in secrets:
            key = self.keys.get(name) or Key(name, disabled=True, subject=one)
            ends = [end for end in (key.expires, valid_until) if end is not None]
            self.known[blinded(one, secret)] = one, Caller(
                ("key", key.subject), name, key_name=name, role=key.role, stored_key=key,
                until=-1.0 if key.disabled else min(ends, default=None))

    def has_admin(self, wall: float) -> bool:
        return any(caller.role == "admin" and (caller.until or inf) > wall
                   for _, caller in self.known.values())


class Callers:
    """Finds out who sent a request, and from where."""
    MAX_HOPS = 32

    def __init__(self, config: Config, secret: bytes, stored: StoredKeys):
        """`stored` are keys beside those of the settings; digests are blinded by the `secret`."""
        is_azure = any(upstream.dialect == "azure" for upstream in config.all_upstreams)
        self.credential_fields = CREDENTIAL_FIELDS[1:] + (AZURE_CREDENTIAL_FIELD,) * is_azure
        self.trusted = config.trusted_proxies or ()
        self.caller_header = config.caller_header
        self.secret = secret
        self.stored = stored
        keys = config.proxy_api_keys
        self.is_open = not keys and (keys is not None or not stored.closed)
        self.known: Known = {}
        for key, name, role in (
                *((key, name, "caller") for key, name in (keys or {}).items()),
                (config.viewer_key, "VIEWER_KEY", "viewer"),
                (config.admin_key, "ADMIN_KEY", "admin")):
            if key:
                one = digest(key)
                self.known[blinded(one, secret)] = one, Caller(
                    ("key", one), name, secret, name, role)

    def credential(self, fields: Fields, query: str) -> Optional[str]:
        """Returns the credential of a request, in whichever field or as ?key=, None without one.
        Its digest decides who calls; itself it is only for an upstream that takes callers' own."""
        scheme, _, token = fields.get("authorization", "").partition(" ")
        credentials = {fields.get(name) for name in self.credential_fields}
        if scheme.lower() == "bearer":
            credentials.add(token.strip())
        if query:
            credentials.update(split_query(query)[0])
        credentials -= {None, ""}
        if len(credentials) > 1:
            raise BadRequest("The request carries two different credentials")
        credential = "".join(credentials)
        if re.search(r"[\x00-\x1f\x7f]", credential):  # an escape in a query may be a line end
            raise BadRequest("The credential holds control characters")
        return credential or None

    def trusts(self, host: str) -> bool:
        """Returns whether `host` is the address of a proxy that is believed."""
        return any(parse_ip(host) in network for network in self.trusted)

    def address(self, fields: Fields, host: str) -> str:
        """Returns whose address counts: `host`, the peer's, or, where that is a trusted proxy, the
        last one in X-Forwarded-For that is none. What was written before that could be anybody's
        words."""
        hops = fields.get("x-forwarded-for", "").split(",")[-self.MAX_HOPS:]
        while hops and self.trusts(host):
            match = FORWARDED_ADDRESS.fullmatch(hops.pop())
            try:
                host = str(parse_ip(match[match.lastindex]))
            except (AttributeError, ValueError):
                break  # no address: what stands before it is worth no more
        return address_of(host)

    def end_user(self, fields: Fields, peer: str, caller: Caller) -> Caller:
        """Returns the person in the field of a trusted proxy, as a caller of its own, named
        KEY/USER, or -/USER without a key; else `caller`."""
        name = self.caller_header and self.trusts(peer) and fields.get(self.caller_header)
        if not name:
            return caller
        keyed = caller.key[0] == "key"
        owner = hashlib.sha256(repr((caller.key if keyed else None, name)).encode())
        if len(name) > 64:
            name = f"{name[:55]}~{owner.hexdigest()[:8]}"
        name = urllib.parse.quote(name, safe="@:+~", encoding="latin-1")
        label = caller.label if keyed else "-"
        return Caller(("key", owner.digest()), f"{label}/{name}", key_name=caller.key_name,
                      role=caller.role, stored_key=caller.stored_key, until=caller.until)

    def identify(self, credential: Optional[str], address: str, wall: float) -> Caller:
        """Returns the caller at the time `wall`. Raises Unauthorized for an unknown credential
        where keys are asked for, and everywhere for one that was valid before."""
        one = credential and digest(credential)
        caller = one and self.known_by(one)
        if caller:
            if caller.until is not None and caller.until <= wall:
                raise Unauthorized(cause=f"key of {caller.label} ended")
            return caller
        if not self.is_open:
            raise Unauthorized
        if one is None:
            return Caller(("address", address), address)
        return Caller(("key", one), None, self.secret, origin=("address", address))

    def known_by(self, credential):
        """Returns the caller whose secret has this digest, None if there is none."""
        blind = blinded(credential, self.secret)
        entry = self.known.get(blind) or self.stored.known.get(blind)
        return entry[1] if entry and hmac.compare_digest(entry[0], credential) else None

    def everybody(self) -> List[Caller]:
        """Returns all whose keys were given out."""
        return [caller for _, caller in [*self.known.values(), *self.stored.known.values()]]

    def named(self, label: str) -> List[Caller]:
        """Returns the callers with this label: several where PROXY_API_KEYS has a name twice. A
        caller without a name is found by its address alone."""
        callers = {caller.key: caller for caller in self.everybody() if caller.label == label}
        if not callers:
            with suppress(ValueError):
                ipaddress.ip_network(label)
                return [Caller(("address", label), label)]
        return list(callers.values())


class Origins:
    """Decides which web pages may call. A browser tells the page's origin with every POST, whatever
    the page wants, so a page cannot spend in the name of a person who opens it."""
    # What no page of the web can have.
    SCHEMES = "chrome-extension moz-extension app tauri capacitor vscode-webview".split()
    SHAPE = re.compile(r"([a-z][a-z0-9+.-]*)://(\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(?::[0-9]{1,5})?")
    LONGEST = 300  # characters: a host has 253 (RFC 1035 2.3.4)

    def __init__(self, allowed: Sequence[str], host_name: str):
        """`allowed` as CORS_ORIGINS has it; `host_name` is what this machine calls itself."""
        self.any = allowed == ("*",)
        self.none = not allowed
        self.local = "local" in allowed
        self.host_name = host_name.lower()
        globs = [re.escape(one).replace(r"\*", "[a-z0-9.-]+") for one in allowed if one != "local"]
        self.shape = re.compile("|".join(globs) or "(?!)")

    def allows(self, origin: str) -> bool:
        if self.any or len(origin) > self.LONGEST:
            return self.any
        if self.shape.fullmatch(origin):
            return True
        match = self.local and self.SHAPE.fullmatch(origin.lower())
        if not match or match[1] in self.SCHEMES:
            return bool(match)
        host = match[2].strip("[]")
        return match[1] in ("http", "https") and (host == self.host_name or not is_external(host))

    @staticmethod
    def is_own(fields: Fields) -> bool:
        """Tells whether a page of ours asks, which shows a key in a field of its own."""
        host = fields.get("host", "")  # HTTP/1.0 may name none
        return fields.get("origin", "").partition("://")[2].lower() == host.lower() != ""

    def check(self, method: str, fields: Fields):
        """Raises ForeignOrigin for a request of a web page that may not make it. Reading the answer
        is prevented by the browser."""
        origin = fields.get("origin")
        if origin is not None and method not in ("GET", "HEAD", "OPTIONS") and (
                not self.allows(origin)):
            raise ForeignOrigin


# --------------------------------------------------------------------------------------------------
# Limits: a bucket holds at most `capacity` tokens, gains `refill` every whole `interval` seconds,
# and starts full; a window is full again when it is over. Taking is all or nothing. All of it
# belongs to the event loop's thread, so there is no lock. It knows neither HTTP nor what a token
# stands for.
# --------------------------------------------------------------------------------------------------

USD = UNITS.index("usd")
RUNNING = UNITS.index("running")
PROMPT = UNITS.index("input_tokens")
RUNNING_SECONDS = 2  # to ask again after, where too many calls run: nobody knows when they end
NO_COST = (0,) * len(UNITS)
Amount = Union[int, str]                       # str: in dollars
Costs = Tuple[int, ...]                        # in the order of UNITS
BucketKey = Tuple[Union[str, CallerKey], ...]  # the rule's text, then whose bucket it is
KeyedRules = Sequence[Tuple[Rule, BucketKey]]  # the rules of a call, each with its bucket


def wall_time(clock: Any) -> float:
    """Returns seconds since 1970."""
    return clock.time_ns() / 1e9


@lru_cache(1000)
def format_usd(picodollars: int) -> str:
    """12_500_000 -> '0.0000125'."""
    return f"{Decimal(picodollars) / PICODOLLARS:f}"


def format_amount(rule, amount):
    """Returns an amount as people and headers see it: in dollars where the rule counts money."""
    return format_usd(amount) if rule.unit == USD else amount


def format_wait(wait):
    """12 -> '12s', 61 -> '2 min', 60_000 -> '17 hours', 200_000 -> '3 days'."""
    for seconds, word in ((86400, "days"), (3600, "hours")):
        if wait > 2 * seconds:
            return "%d %s" % (ceil(wait / seconds), word)
    return "%ds" % ceil(wait) if wait <= 59 else "%d min" % ceil(wait / 60)


# Where each call makes one: by its class a NamedTuple takes CPython twice as long.
new_tuple = tuple.__new__


class Quota(NamedTuple):
    """One bucket at one moment, for headers: amounts as `format_amount` gives them, times in whole
    seconds. `reset_seconds` is the time to the next refill, 0 where the bucket is full; all three
    are 0 where there is none."""
    limit: Amount
    remaining: Amount
    refill_tokens: Amount
    refill_seconds: int
    reset_seconds: int


class Level(NamedTuple):
    """What a bucket holds at the moment `now`, after one call has taken `amount`. A `level` below 0
    is a debt, or what that call lacks. `refilled` is the time of the last refill."""
    level: int
    refilled: float
    rule: Rule
    key: BucketKey
    amount: int
    now: float

    @property
    def quota(self) -> Quota:
        level, refilled, rule, _, _, now = self
        _, _, unit, capacity, _, length, (amount, interval), _, _, _, _ = rule
        left = level if level > 0 else 0
        if unit == RUNNING:
            return Quota(capacity, left, 0, 0, 0)
        reset = 0
        if level < capacity:
            reset = ceil(refilled + length - now)
        elif level > capacity:  # more was given
            capacity = level
        if unit == USD:
            return Quota(format_usd(capacity), format_usd(left), format_usd(amount), interval,
                         reset)
        return new_tuple(Quota, (capacity, left, amount, interval, reset))

    @property
    def wait(self) -> float:
        """Seconds until nothing is missing."""
        if self.rule.unit == RUNNING:
            return RUNNING_SECONDS if self.level < 0 else 0
        refills = -(self.level // self.rule.refill)
        return max(0, self.refilled + refills * self.rule.interval - self.now)

    def untaken(self):
        """Returns the same bucket as it was before `amount` was taken."""
        return self.less(-self.amount)

    def less(self, amount):
        """Returns the same bucket after `amount` more is taken of it."""
        return self._replace(amount=self.amount + amount, level=self.level - amount)


def tightest_of(levels):
    """Returns the bucket with the least left, as a share of its capacity. A bucket of running calls
    comes last unless it is short: it says nothing of the day."""
    if len(levels) == 1:
        return levels[0]
    return min(levels, key=lambda one: (
        one.rule.unit == RUNNING and one.level >= 0, one.level / one.rule.capacity))


def date_in(zone: datetime.tzinfo, moment: float) -> datetime.date:
    return datetime.datetime.fromtimestamp(moment, zone).date()


def midnight(day: datetime.date, zone: datetime.tzinfo) -> int:
    """Returns when a day begins, in unix seconds."""
    return int(datetime.datetime(day.year, day.month, day.day, tzinfo=zone).timestamp())


def day_after(day, step):
    """Returns the day after, or that of the next week or the first of the next month."""
    if step == "month":
        return (day.replace(day=28) + datetime.timedelta(4)).replace(day=1)
    return day + datetime.timedelta(7 if step == "week" else 1)


def calendar_rule(rule: Rule, wall: float) -> Rule:
    """Returns the rule of the day, week (from Monday) or month that it is: some days have 23
    hours, or 25."""
    zone = time_zone(rule.zone) or datetime.timezone.utc
    day = date_in(zone, wall)
    if rule.window == "week":
        day -= datetime.timedelta(day.weekday())
    elif rule.window == "month":
        day = day.replace(day=1)
    began = midnight(day, zone)
    length = midnight(day_after(day, rule.window), zone) - began
    return rule._replace(began=began, interval=length, rate=(rule.rate[0], length))


def window_at(rule: Rule, known: Optional[Level], capacity: int, now: float, wall: float
              ) -> Tuple[Rule, int, float]:
    """Returns the rule of the window that it is at `now`, what is in that, and when it began: one
    of a fixed length with the call that found the bucket full, or the last window over. `known` is
    the bucket as it was last seen. A clock that is set back a little begins no period twice."""
    if rule.zone:
        if known and -3600 < wall - known.rule.began < known.rule.interval:
            rule = known.rule
        else:
            rule = calendar_rule(rule, wall)
        began = rule.began - wall + now
        goes_on = known and known.rule.began == rule.began
    else:
        goes_on = (known and known.level < rule.capacity
                   and now - known.refilled + 1e-6 < rule.interval)
        began = known.refilled if goes_on else now
    level = known.level if known else capacity
    if not goes_on:  # as if nothing had been taken; what was given beyond the rule stays
        level = max(level, rule.capacity)
    return rule, min(level, capacity), began


class Buckets:
    """Every bucket of every rule, in memory. A bucket that is not in the table is full, so full
    ones need not be kept."""
    # Of a store in Redis: whether it is away, how many processes share it, names of keys.
    is_degraded: Optional[bool] = None
    processes = 0
    redis: Optional["Redis"] = None
    prefix = ""
    offset = 0.0  # how far the wall clock was ahead of the monotonic one

    def __init__(self, clock: Any, room: int = 10_000):
        self.clock = clock
        self.room = room
        self.levels: "OrderedDict[BucketKey, Level]" = (
            OrderedDict())  # as they were last seen; least recently used first
        # key -> (amount, until) of what a bucket holds beyond its rule
        self.given: Dict[BucketKey, List[Tuple[int, float]]] = {}

    def health(self) -> JsonObject:
        """Returns what /health says of a store outside of this process."""
        return {}

    def given_to(self, key, now):
        """Returns how much a bucket was given beyond its rule, of what has not ended."""
        gifts = [one for one in self.given.pop(key, ()) if one[1] > now]
        if gifts:
            self.given[key] = gifts
        return sum([amount for amount, _ in gifts])

    def capacity_of(self, rule: Rule, key: BucketKey) -> int:
        """Returns what a bucket holds at most, with what it was given."""
        return rule.capacity + self.given_to(key, self.clock.monotonic())

    def give(self, rule: Rule, key: BucketKey, amount: int, until: float, again: bool = False):
        """Raises a bucket's capacity until then, and its level too, unless `again`: then that was
        done before. What is left afterwards is kept up to the rule's capacity."""
        if not again:
            self.store([self.level_of(rule, key).less(-amount)])
        self.given.setdefault(key, []).append((amount, until))

    def fill(self, owner: CallerKey):
        """Fills all buckets of a caller but those of running calls."""
        self.drop([bucket.key for bucket in self.seen()
                   if owner in bucket.key[1:] and bucket.rule.unit != RUNNING])

    def levels_after(self, keyed_rules, costs, taken, taken_at=0.0):
        """Returns the buckets' levels once `costs` are charged instead of what was `taken`. The
        time of the last refill moves by whole intervals, so it does not drift; it starts when a
        bucket stops being full."""
        now = self.clock.monotonic()
        levels = []
        for rule, key in keyed_rules:
            _, _, unit, capacity, refill, interval, _, _, window, _, _ = rule
            if self.given:
                capacity += self.given_to(key, now)
            known = self.levels.get(key)
            back = taken[unit]
            if window:
                rule, level, refilled = window_at(
                    rule, known, capacity, now, wall_time(self.clock))
                if taken_at + 1e-6 < refilled:  # nothing comes back of an earlier one
                    back = min(back, costs[unit])
            elif known is None:
                level = capacity
                refilled = now
            else:
                level, refilled, _, _, _, _ = known
                passed = now - refilled + 1e-6  # a microsecond for what floats lose
                if passed >= interval:
                    steps = int(passed / interval)
                    level += steps * refill
                    refilled += steps * interval
                if level >= capacity:
                    level = capacity
                    refilled = now
            cost = costs[unit]
            level += back - cost
            if level > capacity:
                level = capacity
            levels.append(new_tuple(Level, (level, refilled, rule, key, cost, now)))
        return levels

    def level_of(self, rule, key):
        """Returns what is in a bucket."""
        return self.levels_after(((rule, key),), NO_COST, NO_COST)[0]

    async def take(self, keyed_rules: KeyedRules, costs: Costs) -> Tuple[Level, List[Level]]:
        """Takes `costs` from all buckets, or nothing if one of them lacks some; returns the
        tightest and all of them, as they are or would have been."""
        levels = self.levels_after(keyed_rules, costs, NO_COST)
        tightest = tightest_of(levels)
        if tightest.level >= 0:
            self.store(levels)
        return tightest, levels

    def settle(self, keyed_rules: KeyedRules, costs: Costs, taken: Costs,
               taken_at: float) -> Level:
        """Charges `costs` instead of what was taken at that time; returns the tightest bucket. It
        never waits: a store outside of this process queues it."""
        levels = self.levels_after(keyed_rules, costs, taken, taken_at)
        self.store(levels)
        return tightest_of(levels)

    def peek(self, keyed_rules: KeyedRules, amount: int) -> Tuple[Quota, int]:
        """Returns the tightest bucket, and the whole seconds until `amount`, or as much as it can
        hold, could be taken from each. It adds no bucket to the table."""
        levels = [self.level_of(rule, key) for rule, key in keyed_rules]
        waits = [one.less(min(amount, one.rule.capacity)).wait for one in levels]
        return tightest_of(levels).quota, ceil(max(waits))

    def store(self, levels):
        """Keeps `levels`, whose buckets become the most recently used."""
        for level in levels:
            _, _, _, key, _, _ = level
            if self.levels.pop(key, None) is None:
                self.make_room()
            self.levels[key] = level

    def make_room(self):
        """Drops old buckets that are full by now. Few are looked at for each that is added, so this
        never takes long. If the table has no room, and none of them is full, the fullest goes, in
        favour of its caller, but none that all share."""
        crowded = len(self.levels) >= self.room
        oldest = [self.levels[key] for key in islice(self.levels, 4 if crowded else 2)]
        full = [bucket.key for bucket in oldest if self.is_full(bucket)]
        self.drop(full)
        if crowded and not full:
            for bucket in oldest:
                self.levels.move_to_end(bucket.key)  # others are looked at next
            self.drop([bucket.key for bucket in sorted(
                oldest, key=lambda bucket: -bucket.level / bucket.rule.capacity)
                if len(bucket.key) > 1][:1])

    def is_full(self, bucket):
        """Returns whether a bucket is full by now."""
        level = self.level_of(bucket.rule, bucket.key).level  # drops gifts that have ended
        return bucket.key not in self.given and level >= bucket.rule.capacity

    def snapshot(self, wall: float, keys: Optional[Iterable[BucketKey]] = None
                 ) -> Dict[BucketKey, Tuple[int, float]]:
        """Returns {key: (level, wall-clock time of the last refill)} of the given buckets, or of
        all, that are not full; running calls are left out, because they end with the process."""
        return self.as_saved(wall, [
            bucket for bucket in self.latest(self.levels if keys is None else keys)
            if not self.is_full(bucket)])

    def as_saved(self, wall: float, levels: Iterable[Level]) -> Dict[BucketKey, Tuple[int, float]]:
        """Returns a snapshot of these levels. Any thread may ask."""
        offset = wall - self.clock.monotonic()
        if abs(offset - self.offset) > 0.01:  # less is none: the two clocks are not read at once
            self.offset = offset
        # A period of the calendar began by the wall clock, which may have been set since.
        return {bucket.key: (bucket.level, bucket.rule.began or bucket.refilled + self.offset)
                for bucket in levels if bucket.rule.unit != RUNNING}

    def seen(self) -> List[Level]:
        """Returns all known buckets as they were last seen, which may be long ago."""
        return list(self.levels.values())

    def drop(self, keys: Iterable[BucketKey]):
        """Makes buckets full."""
        for key in keys:
            del self.levels[key]

    def latest(self, keys: Iterable[BucketKey]) -> List[Level]:
        """Returns those of the buckets that are in the table, as they were last seen. Any thread
        may ask: what is in the table is never changed, only replaced."""
        return [one for one in map(self.levels.get, keys) if one is not None]

    def restore(self, rule: Rule, key: BucketKey, level: int, since: float):
        """Puts back a bucket as it was `since` seconds ago."""
        now = self.clock.monotonic()
        if rule.zone:
            # A second later: the clocks are not read at once.
            rule = calendar_rule(rule, wall_time(self.clock) - since + 1)
        self.levels[key] = Level(level, now - max(0, since), rule, key, 0, now)


class Hold:
    """Amounts that are reserved for one call in all its buckets. It ends once, settled or given
    back; leaving the with-block gives it back. `tightest` is the tightest bucket as it was last
    seen, None if the call takes nothing."""
    ended = False

    def __init__(self, buckets: Optional[Buckets] = None, keyed_rules: KeyedRules = (),
                 costs: Costs = NO_COST, tightest: Optional[Level] = None,
                 taken_at: float = 0.0):
        self.buckets = buckets
        self.keyed_rules = keyed_rules
        self.costs = costs
        self.tightest = tightest
        self.held = tightest.amount if tightest else 0
        self.taken_at = tightest.now if tightest else taken_at  # on the monotonic clock

    def __repr__(self):
        return f"<Hold {self.describe_charges() or 'nothing'}{', ended' * self.ended}>"

    def settle(self, costs: Costs):
        """Charges what the call really cost: a surplus goes back, a shortfall becomes a debt. The
        call counts as running no longer."""
        if self.ended:
            return
        self.ended = True
        if costs[RUNNING]:
            costs = (*costs[:RUNNING], 0, *costs[RUNNING + 1:])
        taken = self.costs
        self.costs = costs
        for rule, _ in self.keyed_rules:
            unit = rule.unit
            if costs[unit] != taken[unit]:
                self.tightest = self.buckets.settle(
                    self.keyed_rules, costs, taken, self.taken_at)
                break

    def give_back(self):
        self.settle(NO_COST)

    @property
    def output_tokens(self) -> int:
        """The output tokens that it reserves."""
        _, total, prompt, output, *_ = self.costs
        return min(output, max(0, total - prompt))

    def describe_charges(self) -> str:
        """Returns what every bucket was charged, for the books."""
        text = ""  # a list would cost as much again
        for rule, _ in self.keyed_rules:
            cost = self.costs[rule.unit]
            if cost:
                text += f";{rule.text}={cost}"
        return text[1:]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if not self.ended:
            self.give_back()


# Names of one model differ by its vendor, its date and its route, which make it no other model.
# Tags of Ollama stay, as they are sizes.
MODEL_SELLER = re.compile(
    r"^(?:(?:us|us-gov|eu|ap|apac|au|ca|jp|sa|global)\.)?(?:ai21|amazon|anthropic|cohere|deepseek"
    r"|google|meta|minimax|mistral|moonshotai|moonshot|nvidia|openai|qwen|writer|xai|zai)\.")
# No text matches two of these, or a name of many would take exponential time.
MODEL_VARIANT = re.compile(
    r"(?:-latest|-00[0-9]|-[0-9]{4}-[0-9]{2}-[0-9]{2}|-[0-9]{8}"
    r"|(?<=[0-9])-v[0-9]+|(?<![0-9])-v[0-9]+(?=:)"
    r"|:(?:[0-9]+k?|latest|free|thinking|online|nitro|floor|beta|extended|exacto|fastest|cheapest)"
    r"|\[[0-9]+m\])+$")
VERSION_DOT = re.compile(r"(?<=[0-9])\.(?=[0-9])")
WILDCARD = re.compile(r"[*?[]")


@lru_cache(1000)
def fold_model(name: str) -> str:
    """Returns the one spelling for all of a model: 'us.anthropic.claude-sonnet-4-5-20250929-v1:0',
    'anthropic/claude-sonnet-4.5' and 'claude-sonnet-4-5@20250929' -> 'claude-sonnet-4-5';
    'ft:gpt-4o-mini:org::id' -> 'gpt-4o-mini'. An upstream may not mind the case."""
    folded = name.casefold().rpartition("/")[2]
    if folded.startswith("ft:"):
        folded = folded.split(":")[1]
    folded = MODEL_SELLER.sub("", folded.partition("@")[0])
    return VERSION_DOT.sub("-", MODEL_VARIANT.sub("", folded)) or name.casefold()


@lru_cache(1000)
def fold_glob(glob: str) -> str:
    """Returns a glob for folded names."""
    return VERSION_DOT.sub("-", glob.casefold()) if WILDCARD.search(glob) else fold_model(glob)


def may_use(globs: Sequence[str], model: str) -> bool:
    """Tells whether a key of these models may use one, in whichever spelling."""
    return any([fnmatch.fnmatchcase(model.casefold(), glob.casefold())
                or fnmatch.fnmatchcase(fold_model(model), fold_glob(glob)) for glob in globs])


class Limits:
    """Finds the rules that a call must pass. Of each family only the first rule that matches
    counts: the rules of the caller's own key (in `own`, by its subject), then special ones, then
    those for `each`."""
    MAX_KNOWN = 4_000
    own: Dict[bytes, Tuple[Rule, ...]] = {}

    def __init__(self, ordered_rules: List[Rule], buckets: Buckets, message: str):
        self.rules = ordered_rules
        self.special_first = sorted(ordered_rules, key=lambda rule: ("each", "") in rule.scopes)
        self.buckets = buckets
        self.message = message
        self.kinds = {kind for rule in ordered_rules for kind, _ in rule.scopes}
        self.models = {glob.casefold(): fold_glob(glob)
                       for rule in ordered_rules for kind, glob in rule.scopes if kind == "model"}
        self.known = {}

    def all_rules(self) -> List[Rule]:
        """Returns the general rules and those of single keys."""
        return [*self.rules, *chain.from_iterable(self.own.values())]

    def units(self) -> Set[str]:
        return {UNITS[rule.unit] for rule in self.all_rules()}

    def matching(self, caller: Caller, address: str, model: Optional[str],
                 upstream: str = "base", others: Sequence[str] = ()) -> KeyedRules:
        """Returns the rules that a call must pass, each with the key of its bucket: those of
        `model`, and of the `others` that may serve it instead."""
        kinds = self.kinds  # what no rule asks for would only fill `known`
        call = (caller.key, caller.name, address if "address" in kinds else None,
                model if "model" in kinds else None, upstream, caller.stored_key)
        rules = self.known.get(call)
        if rules is None:
            if len(self.known) >= self.MAX_KNOWN:
                self.known.clear()
            rules = self.known[call] = self.find_rules(*call)
        if others and "model" in kinds:
            for other in others:
                more = self.matching(caller, address, other, upstream)
                rules = rules + [pair for pair in more if pair not in rules]
        return rules

    def find_rules(self, key, name, address, model, upstream, stored_key):
        own, team = (stored_key.rules, stored_key.team) if stored_key else ((), None)
        names = {"key": name, "team": team, "model": (model or "").casefold(), "upstream": upstream}
        owners = self.owners(key, address, team)
        families = {}
        for rule in [*own, *self.special_first]:
            if all(owners.get(kind, key) and self.means(kind, glob, names.get(kind) or "")
                   for kind, glob in rule.scopes):
                whose = [owners[kind] for kind in owners if kind in dict(rule.scopes)]
                families.setdefault(rule.family, (rule, (rule.text, *whose)))
        return sorted([pair for pair in families.values() if pair[0].capacity is not None],
                      key=lambda pair: [*own, *self.rules].index(pair[0]))

    @staticmethod
    def owners(key, address, team):
        """Returns {kind of scope: who has the bucket, None if the call has nobody of this kind}."""
        return {"each": key, "key": key if key[0] == "key" else None,
                "address": ("address", address), "team": team and ("team", team)}

    def not_full(self) -> Dict[CallerKey, Dict[BucketKey, Rule]]:
        """Returns {caller: {key of a bucket: its rule}} of all that may not be full."""
        by_owner = defaultdict(dict)
        for one in self.buckets.seen():
            for owner in one.key[1:]:
                by_owner[owner][one.key] = one.rule
        return by_owner

    def buckets_of(self, caller: Caller, model: Optional[str],
                   not_full: Dict[CallerKey, Dict[BucketKey, Rule]]) -> Dict[BucketKey, Rule]:
        """Returns a caller's buckets: those of a usual call, and the others that are not full."""
        address = caller.key[1] if caller.key[0] == "address" else None
        buckets = {key: rule for rule, key in self.matching(caller, address, model)
                   if address or not any(kind == "address" for kind, _ in rule.scopes)}
        return {**buckets, **not_full.get(caller.key, {})}

    def own_buckets(self, caller: Caller, unit: Optional[str]) -> KeyedRules:
        """Returns the rules of a unit that count this caller alone, each with its bucket."""
        return [(rule, key)
                for key, rule in self.buckets_of(caller, None, self.not_full()).items()
                if key[1:] == (caller.key,) and unit in (rule.word, rule.text.split(" ")[2])]

    def give(self, caller: Caller, unit: str, amount: int, until: float,
             again: bool = False) -> int:
        """Lets the caller's buckets of a unit hold so much more, until then on the monotonic clock;
        returns how many there are."""
        rules = self.own_buckets(caller, unit)
        for rule, key in rules:
            self.buckets.give(rule, key, amount, until, again)
        return len(rules)

    def means(self, kind, glob, name):
        """Returns whether a scope's glob matches a name. A model matches in its other spellings,
        too, unless some rule names that spelling itself."""
        if kind == "model":
            glob = glob.casefold()
            if name not in self.models and fnmatch.fnmatchcase(
                    fold_model(name), self.models[glob]):
                return True
        return fnmatch.fnmatchcase(name, glob)

    def restore(self, saved: Dict[BucketKey, Tuple[int, float]], wall: float) -> int:
        """Puts back the buckets that were saved, with the refill of the time in between. One whose
        rule was changed keeps its share: it is as full, of the new, as it would be of the old.
        Returns how many were saved in the future."""
        find = lru_cache(None)(self.successor)
        for key, (level, since) in saved.items():
            old, new = find(key[0], self.own.get(key[1][1]) if len(key) == 2 else ())
            if new:
                self.buckets.restore(old, key, level, wall - since)
            if new is not old:
                level = self.buckets.level_of(old, key).level * new.capacity // old.capacity
                self.buckets.drop([key])
                heir = (new.text, *key[1:])
                self.buckets.restore(new, heir, level, 0)
                if key in self.buckets.given:
                    self.buckets.given[heir] = self.buckets.given.pop(key)
        return sum([since > wall + 60 for _, since in saved.values()])

    def take_over(self, wall: float, keys: Optional[Iterable[BucketKey]] = None):
        """Moves the given buckets, or all whose rules are gone, to the rules that replace them."""
        if keys is None:
            texts = {rule.text for rule in self.all_rules()}
            keys = [one.key for one in self.buckets.seen() if one.key[0] not in texts]
        moved = self.buckets.snapshot(wall, keys)
        self.buckets.drop(moved)
        self.restore(moved, wall)

    def take_keys(self, own: Dict[bytes, Tuple[Rule, ...]], wall: float):
        """Replaces the rules of single keys; buckets of those that were changed go over."""
        changed = {subject for subject in {*self.own, *own}
                   if self.own.get(subject) != own.get(subject)}
        self.own = own
        self.known.clear()
        self.take_over(wall, [one.key for one in self.buckets.seen()
                              if len(one.key) == 2 and one.key[1][1] in changed])

    def successor(self, text, own):
        """Returns the rule of this text, and the one that replaces it for a caller with rules of
        its `own`: if it is gone, one of the same scopes and unit, if possible of the same duration.
        Both are None without one. `own` is None for a caller whose key is not stored, who may be a
        person behind one that is."""
        families = {rule.family for rule in own or ()}
        now = known = [*(own or ()), *[
            rule for rule in self.rules if rule.family not in families]]
        if own is None:
            known = chain(now, chain.from_iterable(self.own.values()))
        same = next((rule for rule in known if rule.text == text), None)
        if same:
            return (same, same) if same.capacity is not None else (None, None)
        try:
            old = read_rule(text)
        except ValueError:
            return None, None
        new = self.heir(old, now, own or ())
        return new and old, new

    @staticmethod
    def heir(old, now, own):
        """Returns the rule that replaces an old one, if possible one of its duration."""
        unit = old.text.split(" ")[2]
        heirs = [rule for rule in now if None not in (rule.capacity, old.capacity)
                 and rule.text.split(" ")[2] == unit
                 and (rule.scopes == old.scopes or (rule in own and old.family[0] == ("caller",)))]
        return min(heirs, default=None, key=lambda rule: (
            rule.rate[1] != old.rate[1], rule.window != old.window))

    async def admit(self, caller: Caller, address: str, model: Optional[str], costs: Costs,
                    upstream: str = "base", least: Optional[Costs] = None,
                    others: Sequence[str] = ()) -> Hold:
        """Reserves what the call costs, by every rule that counts. Raises LimitReached. NO_COST
        touches no bucket. Only `least` of the costs was asked for, the rest is a guess: if less
        than that is left, it is enough, or nobody could ever use what is left."""
        matching = self.matching(caller, address, model, upstream, others)
        if not matching or costs is NO_COST:
            return Hold(costs=costs)
        tightest, levels = await self.buckets.take(matching, costs)
        if tightest.level < 0:
            if least is not None and least is not costs:
                costs = self.what_is_left(levels, costs, least)
                tightest, levels = await self.buckets.take(matching, costs)
            if tightest.level < 0:
                raise self.refusal(levels)
        return Hold(self.buckets, matching, costs, tightest)

    @staticmethod
    def what_is_left(levels, costs, least):
        bounded = list(costs)
        for one in levels:
            unit = one.rule.unit
            left = max(1, one.untaken().level)  # an empty bucket has nothing to give
            bounded[unit] = max(least[unit], min(bounded[unit], left))
        return tuple(bounded)

    def refusal(self, levels):
        """Returns the refusal for buckets that are short: the longest wait, in the operator's
        words, or, if a bucket can never hold so much, that waiting does not help."""
        worst = max(levels, key=lambda one: (one.amount > one.rule.capacity, one.wait))
        rule = worst.rule
        unit = rule.text.split(" ")[2]
        if worst.amount > rule.capacity:
            text = "this call would cost %s %s, and the limit is %s: ask for less" % (
                format_amount(rule, worst.amount), unit.replace("_", " "),
                format_amount(rule, rule.capacity))
            return LimitReached(text, None, worst)
        if rule.unit == RUNNING:
            text = "limit reached: %d running already" % rule.capacity
            return LimitReached(text, worst.wait, worst)
        text = self.message
        for word, value in (
                ("{wait}", format_wait(worst.wait)), ("{rule}", rule.text),
                ("{limit}", format_amount(rule, rule.rate[0])), ("{unit}", unit)):
            text = text.replace(word, str(value))
        return LimitReached(text, worst.wait, worst)


class WrongKeys:
    """Limits the wrong keys that come from each address. A right key always passes, because many
    people may share an address."""
    # All ten come back together, when the minute is over.
    RULE = read_rule("address 10 requests per minute")._replace(refill=10, interval=60.0)

    def __init__(self, clock: Any):
        self.buckets = Buckets(clock)

    def refusal(self, address: str) -> Refusal:
        """Returns the refusal for one more wrong key."""
        level = self.buckets.level_of(self.RULE, (self.RULE.text, ("address", address))).less(1)
        if level.level < 0:
            return TooManyGuesses(wait=level.wait)
        self.buckets.store([level])
        return Unauthorized()


# --------------------------------------------------------------------------------------------------
# Usage: what a call will use, estimated from its payload, what it used, and what that costs. It
# knows no wire names and no sockets.
# --------------------------------------------------------------------------------------------------

CHARACTERS_PER_TOKEN = 4
MAX_TOKENS_PER_CALL = 1 << 40     # a count above this is wrong, whoever sent it
MAX_COST = PICODOLLARS * 10 ** 6  # a call that costs more is wrong, too
# What searches of the web cost, by how the model's name begins: millidollars for each, of so many
# of a call. Google charged a call once before Gemini 3.
SEARCH_COSTS = ("gemini-1", 35, 1), ("gemini-2", 35, 1), ("gemini", 14, inf), ("", 10, inf)
KNOWN_MODELS = 1000  # models whose price or ratio is remembered: callers may invent names


def put_newest(table, key, value, most):
    """Puts a value into a table that has `most` at most, and drops the oldest."""
    table[key] = value
    if len(table) > most:
        del table[next(iter(table))]
    return value


def clamp(value, bounds):
    least, most = bounds
    return min(most, max(least, value))


# First bytes, in UTF-8, of characters that make 2 tokens for every 3: CJK, kana, hangul, emoji and
# what stands between. b"\xe2" begins punctuation and signs.
WIDE = {0xe0, 0xe1, *range(0xe3, 0xf5)}
NOT_WIDE = bytes(set(range(256)) - WIDE)


def text_weight(text: str) -> int:
    """Returns the characters of a text, those of scripts that need more tokens counted 8/3 times:
    CHARACTERS_PER_TOKEN of that make about one token."""
    if text.isascii():
        return len(text)
    wide = len(text.encode("utf-8", "surrogatepass").translate(None, NOT_WIDE))
    return len(text) + wide * 5 // 3


class CutText(str):
    """A long string without spaces of which only the beginning was read; `size` is its length."""
    size = 0


# The bytes that are no signs, and tables that leave only words of a text, or only runs of signs.
LETTERS = bytes(one for one in range(256) if one > 127 or chr(one).isalnum())
PROSE = LETTERS + b" \n.,'"
ONLY_WORDS = bytes(one if one in LETTERS else 32 for one in range(256))
ONLY_SIGNS = bytes(32 if one in LETTERS else one for one in range(256))


class TextKind(NamedTuple):
    """Tells what a text is, as far as its tokens differ in length: `number` is 0 for prose in Latin
    letters, 1 to 3 for code, by how it is indented, and 4 for other scripts. `scale` is the weight
    that makes as many tokens as a weight of 1 in prose: each piece of code has its own."""
    number: int = 0
    scale: float = 1.0


PROSE_KIND = TextKind()


def kind_of_text(text: str) -> TextKind:
    """Judges by the beginning and the middle. In code, a word, a run of signs and the end of a line
    are about a token each."""
    middle = max(500, len(text) // 2)
    sample = text[:500] + text[middle:middle + 500]
    data = sample.encode("utf-8", "surrogatepass")
    size = len(data)
    if size * 3 > len(sample) * 4:
        return TextKind(4)
    if len(data.translate(None, PROSE)) * 25 <= size:
        return PROSE_KIND  # the usual case
    words, signs = data.translate(ONLY_WORDS).split(), data.translate(ONLY_SIGNS).split()
    units = len(words) + len(signs) + data.count(b"\n")
    scale = len(sample) / max(1, units) / CHARACTERS_PER_TOKEN
    return TextKind(1 + min(2, data.count(b"  ") * 20 // size), clamp(scale, (0.25, 1.2)))


NUMBERS = frozenset((int, float))


class Usage(NamedTuple):
    """Tokens of one call. `input` counts all of the prompt; `cached` and `cache_write` are the
    parts of it that were read from a cache and written to one, and `hour_write` the part of the
    latter that is kept for an hour. `output` counts all that was generated; `reasoning` is the part
    of it that stays hidden. `estimated`: nobody reported it, so it was guessed from the text.
    `model` is the one that served, `tiers` are what the response says of how (service_tier, speed,
    inference_geo), `picodollars` what it says that it cost; `others` is what other models did for
    the same call, and `searches` is how often the web was searched for it."""
    input: int = 0
    output: int = 0
    cached: int = 0
    cache_write: int = 0
    reasoning: int = 0
    estimated: bool = False
    hour_write: int = 0
    model: Optional[str] = None
    tiers: Tuple[str, ...] = ()
    picodollars: Optional[int] = None
    others: Tuple["Usage", ...] = ()
    searches: int = 0

    def with_others(self) -> "Usage":
        """Returns the same with what other models did in its counts."""
        if not self.others:
            return self
        *sums, _, hour_write = map(sum, zip(*[one[:7] for one in (self, *self.others)]))
        return Usage(*sums, self.estimated, hour_write, self.model, self.tiers, self.picodollars)


# List prices as published for text, in USD per million tokens, collected on 2026-11-28: rows of a
# name, input, output, read from a cache, written to one. Before them stands what all of them share:
# the tokens of a prompt above which input and output cost so many times that, and tiers that are
# not as usual. Prices that end within weeks are left out for those that follow.
USUAL_PRICES = (
    # https://developers.openai.com/api/docs/pricing and its pages of models
    ("272000 2 1.5; ultrafast 3", "gpt-6.2-astra 8 40 .4 10; gpt-6.2-sol 2 10 .1 2.5"),
    ("272000 2 1.5", """
        gpt-6.1-sol 2 10 .1 2.5; gpt-6.1-terra 1 5 .05 1.25; gpt-6-astra 10 50 1 12.5
        gpt-6-sol 2 10 .2 2.5; gpt-6-luna .1 .5 .01 .125; gpt-5.6 4 20 .4 5; gpt-5.6-sol 4 20 .4 5
        gpt-5.6-terra 2 12 .2 2.5; gpt-5.6-luna .2 1.2 .02 .25; gpt-5.4 2.5 15 .25
        gpt-5.4-pro 30 180; gpt-5.5-pro 30 180"""),
    ("272000 2 1.5; priority 2.5; fast 2.5", "gpt-5.5 5 30 .5"),
    ("priority 1.8; fast 1.8", "gpt-5-mini .25 2 .025"),
    ("priority 1.75; fast 1.75", """
        gpt-4.1 2 8 .5; gpt-4.1-mini .4 1.6 .1; o3 2 8 .5"""),
    ("", """
        gpt-5.4-mini .75 4.5 .075; gpt-5.4-nano .2 1.25 .02; gpt-5.3-codex 1.75 14 .175
        gpt-5.3-chat-latest 1.75 14 .175; gpt-5.2-chat-latest 1.75 14 .175
        gpt-5.1-chat-latest 1.25 10 .125
        gpt-5.2 1.75 14 .175; gpt-5.2-codex 1.75 14 .175; gpt-5.2-pro 21 168
        gpt-5.1 1.25 10 .125; gpt-5.1-codex 1.25 10 .125; gpt-5.1-codex-max 1.25 10 .125
        gpt-5.1-codex-mini .25 2 .025; gpt-5 1.25 10 .125; gpt-5-codex 1.25 10 .125
        gpt-5-nano .05 .4 .005; gpt-5-pro 15 120; gpt-4.1-nano .1 .4 .025; gpt-4o 2.5 10 1.25
        gpt-4o-mini .15 .6 .075; gpt-4-turbo 10 30; gpt-3.5-turbo .5 1.5; o4-mini 1.1 4.4 .275
        o3-pro 20 80; o3-mini 1.1 4.4 .55; o1 15 60 7.5; text-embedding-3-small .02 0
        text-embedding-3-large .13 0; text-embedding-ada-002 .1 0; ft:gpt-4.1 3 12 .75
        ft:gpt-4.1-mini .8 3.2 .2; ft:gpt-4.1-nano .2 .8 .05; ft:gpt-4o 3.75 15 1.875
        ft:gpt-4o-mini .3 1.2 .15"""),
    # https://platform.claude.com/docs/en/about-claude/pricing; its priority tier is paid ahead
    ("100000 5 5; priority 1", "claude-haiku-5.5 .1 .5 .01 .125"),
    ("200000 2 1.5; priority 1", """
        claude-sonnet-4.5 3 15 .3 3.75; claude-sonnet-4 3 15 .3 3.75
        claude-sonnet-4.0 3 15 .3 3.75"""),
    ("priority 1; fast 6", "claude-opus-4.7 5 25 .5 6.25; claude-opus-4.6 5 25 .5 6.25"),
    ("priority 1", """
        claude-fable-5.2 8 40 .2 10; claude-fable-5.1 10 50 .25 12.5; claude-fable-5 10 50 1 12.5
        claude-mythos-5.2 8 40 .2 10; claude-mythos-5.1 10 50 .25 12.5
        claude-mythos-5 10 50 1 12.5; claude-opus-5.5 4 20 .2 5; claude-opus-5 5 25 .5 6.25
        claude-opus-4.8 5 25 .5 6.25; claude-opus-4.5 5 25 .5 6.25
        claude-opus-4.1 15 75 1.5 18.75; claude-opus-4 15 75 1.5 18.75
        claude-opus-4.0 15 75 1.5 18.75; claude-sonnet-5.5 2 10 .1 2.5; claude-sonnet-5 2 10 .2 2.5
        claude-sonnet-4.6 3 15 .3 3.75; claude-3.7-sonnet 3 15 .3 3.75
        claude-haiku-4.5 1 5 .1 1.25; claude-3.5-haiku .8 4 .08 1; claude-3-haiku .25 1.25 .03 .3
        """),
    # https://ai.google.dev/gemini-api/docs/pricing
    ("200000 2 1.5; priority 1.8", """
        gemini-3.1-pro 2 12 .2; gemini-3.1-pro-preview 2 12 .2; gemini-3-pro-preview 2 12 .2
        gemini-3.1-pro-preview-customtools 2 12 .2
        gemini-2.5-pro 1.25 10 .125"""),
    ("priority 1.8", """
        gemini-4-argon 4 20 .2; gemini-4-neon 3 15 .15; gemini-4-hydrogen 1.5 7.5 .075
        gemini-3.8-flash 1.5 7.5 .15; gemini-3.7-flash 1.5 7.5 .15; gemini-3.6-flash 1.5 7.5 .15
        gemini-3.5-flash 1.5 9 .15; gemini-3.5-flash-lite .3 2.5 .03
        gemini-3.1-flash-lite .25 1.5 .025; gemini-3.1-flash-lite-preview .25 1.5 .025
        gemini-3-flash-preview .5 3 .05; gemini-2.5-flash .3 2.5 .03
        gemini-2.5-flash-lite .1 .4 .01; gemini-2.0-flash .1 .4 .025
        gemini-2.0-flash-lite .075 .3; gemini-embedding-001 .15 0"""),
    # https://docs.x.ai/developers/models
    ("199999 2 2", """
        grok-4.7 2 6 .5; grok-4.6 2 6 .5; grok-4.5 2 6 .5; grok-4.3 1.25 2.5 .2
        grok-4.20-reasoning 1.25 2.5 .2; grok-4.20-non-reasoning 1.25 2.5 .2
        grok-4.20-0309-reasoning 1.25 2.5 .2; grok-4.20-0309-non-reasoning 1.25 2.5 .2
        grok-build-0.1 1 2 .2"""),
    ("127999 2 2", """
        grok-4 3 15 .75; grok-4-fast .2 .5 .05; grok-4-fast-reasoning .2 .5 .05
        grok-4-fast-non-reasoning .2 .5 .05; grok-4-1-fast-reasoning .2 .5 .05
        grok-4-1-fast-non-reasoning .2 .5 .05"""),
    ("", "grok-3 3 15 .75; grok-3-mini .3 .5 .075; grok-code-fast-1 .2 1.5 .02"),
    # https://api-docs.deepseek.com/quick_start/pricing at peak hours; at others it is half
    ("", """
        deepseek-flash .3 1.2 .006; deepseek-v4-flash .3 1.2 .006; deepseek-chat .3 1.2 .006
        deepseek-reasoner .3 1.2 .006; deepseek-v4-pro 1.32 3.96 .044"""),
    # https://platform.kimi.ai/docs/pricing/chat
    ("", """
        kimi-k3.1-pro 2 10 .2 2; kimi-k3.1-pro-highspeed 4 20 .2 4; kimi-k3 3 15 .3
        kimi-k2.7-code .95 4 .19; kimi-k2.7-code-highspeed 1.9 8 .38; kimi-k2.6 .95 4 .16
        kimi-k2.5 .6 3 .1; kimi-k2-thinking .6 2.5 .15; kimi-k2-thinking-turbo 1.15 8 .15"""),
    # Mistral, Alibaba, Z.ai and MiniMax, as others list them
    ("", """
        mistral-large-2512 .5 1.5; mistral-large-4 .68 2.09; mistral-large-4.0 .68 2.09
        mistral-medium-3.5 1.5 7.5; mistral-medium 1.5 7.5; mistral-small .15 .6; codestral .3 .9
        devstral .4 2; devstral-2512 .4 2; magistral-medium 2 5; mistral-embed .1 0
        qwen3.8-max 2 6; qwen3.7-max 2.5 7.5 .5 3.125; qwen3-max 1.2 6; glm-5.3 1.4 4.4 .26
        glm-5.3-flash .15 .5 .03; glm-5.2 1.4 4.4 .26; glm-5.1 1.4 4.4 .26; glm-5 1 3.2 .2
        glm-4.7 .6 2.2 .11; glm-4.6 .6 2.2 .11; glm-4.5-air .2 1.1 .03
        glm-5-turbo 1.2 4 .24; glm-5v-turbo 1.2 4 .24; mistral-medium-2604 1.5 7.5
        mistral-small-2603 .15 .6; mistral-large-2411 2 6; qwen3.5-plus .4 2.4
        minimax-m2.7 .3 1.2 .06 .375; minimax-m2.7-highspeed .6 2.4 .06 .375
        minimax-m2.5 .3 1.2 .03 .375; minimax-m2.5-highspeed .6 2.4 .06 .375"""),
    ("256000 4 2", "qwen3.7-plus .5 3 .05 .625; qwen3.6-plus .5 3 .05 .625"),
    ("512000 2 2", "minimax-m3 .3 1.2 .06"))


def usual_prices() -> Dict[str, Price]:
    """Returns {name: Price} of the table, by the names as makers spell them."""
    prices = {}
    for shared, rows in USUAL_PRICES:
        words = [part.split() for part in shared.split(";") if part]
        sizes = [part for part in words if part[0].isdigit()]
        tiers = dict([part for part in words if part not in sizes])
        for row in re.findall(r"[^;\n]*[^;\s]", rows):
            name, *values = row.split()
            cost, above = dict(zip(Price._fields, map(Decimal, values))), {}
            for tokens, times, output_times in sizes:
                above = {key: value * Decimal(times) for key, value in cost.items()}
                above.update(tokens=tokens, output=cost["output"] * Decimal(output_times))
            prices[name] = read_price({**cost, "tiers": tiers, "above": above})
    return prices


def search_cost(model: str, searches: int) -> int:
    """Returns what searches of the web cost, in picodollars."""
    name = fold_model(model)
    cost, most = next(row[1:] for row in SEARCH_COSTS if name.startswith(row[0]))
    return min(searches, most) * cost * PICODOLLARS // 1000


class Prices:
    """What models cost, and therefore calls. The operator's own prices go before the usual ones. A
    model without a price costs nothing, and its calls are marked as unpriced."""
    FREE = read_price({"input": 0})

    def __init__(self, own: Optional[Dict[str, Price]] = None,
                 unpriced: Union[str, Price] = "refuse"):
        """`unpriced` is the price of models that have none, or whether to `allow` them where money
        is counted."""
        self.usual = {self.fold(name): price for name, price in usual_prices().items()}
        self.own = {}
        for name, price in (own or {}).items():
            usual = self.usual.get(self.fold(name), price)
            self.own[name.casefold()] = price._replace(tiers={**usual.tiers, **price.tiers})
        self.globs = [name for name in self.own if WILDCARD.search(name)]
        # Of several spellings the shortest counts, which has no date, and of these the last.
        self.folded = {self.fold(name): self.own[name]
                       for name in sorted(self.own, key=len, reverse=True)}
        self.allows_unpriced = unpriced == "allow"
        self.default = None if isinstance(unpriced, str) else unpriced
        self.find = lru_cache(KNOWN_MODELS)(self.find_price)
        self.find_served = lru_cache(KNOWN_MODELS)(self.find_served_price)

    @staticmethod
    def fold(name):
        """Folds the name of a model; what is free, or tuned by a caller, has a price of its own."""
        name = name.casefold()
        return "ft:" * name.startswith("ft:") + fold_model(name) + ":free" * name.endswith(":free")

    def find_price(self, model):
        name = model.casefold()
        folded = self.fold(name)
        bare = fold_model(name)
        price = self.own.get(name) or self.folded.get(folded) or next(
            (self.own[glob] for glob in self.globs if may_use((glob,), name)), None)
        if price is None and name.endswith(":free"):
            return self.folded.get(bare, self.FREE)  # the operator knows better
        return price or self.usual.get(folded) or self.usual.get(bare) or self.default

    def find_served_price(self, served, asked, tiers):
        """Returns the price of the model that served, or, where nobody knows that, of the one that
        was asked for, in the tiers that the response names."""
        price = self.find(served) if served else None
        if price is None or price is self.default:
            price = self.find(asked)
        # Google says ON_DEMAND_FLEX for flex; some say one twice.
        names = {name.casefold().removeprefix("on_demand_") for name in tiers}
        for name in sorted(names, key=lambda name: not isinstance(  # their own before factors
                price and price.tiers.get(name), Price)):
            price = price and price.in_tier(name)
        return price

    def knows(self, model: str) -> bool:
        """Returns whether a call of this model may pass where money is counted."""
        return self.allows_unpriced or self.find(model) is not None

    def cost(self, used: Usage, model: str) -> Tuple[int, bool]:
        """Returns the cost in picodollars, exactly, and whether it is known: what the response says
        that it costs, else what the model that served does, which is `model` where it does not
        say."""
        prompt, output, cached, written, _, _, hour, served, tiers, told, others, searches = used
        if told is not None:
            return min(MAX_COST, told), True
        price = self.find_served(served, model, tiers)
        if price is None:
            return 0, False
        while prompt > price.above_tokens:
            price = price.above
        uncached = prompt - cached - written
        total = ((uncached if uncached > 0 else 0) * price.input + cached * price.cache_read
                 + (written - hour) * price.cache_write + output * price.output)
        if hour:
            total += hour * price.hour_write
        if searches and price.output:  # a server of one's own charges nothing
            total += search_cost(served or model, searches)
        if others:
            costs = [self.cost(other, model) for other in others]
            total += sum([cost for cost, _ in costs])
            return min(MAX_COST, total), all([known for _, known in costs])
        return min(MAX_COST, total), True


HabitName = Union[str, Tuple[str, int]]


class ModelHabits:
    """What callers of a model were seen to use in their last calls, by name: the share of output
    that nobody sees, `hidden`; the weight of text for a token, by (side, kind of text); and the
    output of calls without a limit, `peak`. Each is known for itself, so that nobody teaches what
    others pay. What a caller has shown in few calls yet is taken for the one in the middle of all,
    within bounds."""
    CALLERS = 50
    MEMORY = 30
    FEW = 3
    OWN_RATIOS = 0.5, 8
    OTHERS_RATIOS = 2, 6

    def __init__(self):
        # In arrays, as there may be many: of each caller who invents names.
        self.callers: "OrderedDict[CallerKey, Dict[HabitName, array.array]]" = OrderedDict()
        self.usual: Dict[HabitName, float] = {}  # forgotten when somebody teaches

    def expect(self, caller: CallerKey, name: HabitName, default: float = 0) -> float:
        """Returns what to expect of a caller."""
        values = self.callers.get(caller, {}).get(name, ())
        if len(values) >= self.FEW:
            return self.typical(name, values)
        if name not in self.usual:
            typical = sorted([self.typical(name, own[name]) for own in self.callers.values()
                              if own.get(name)]) or [default]
            usual = typical[len(typical) // 2]
            self.usual[name] = clamp(usual, self.OTHERS_RATIOS) if type(name) is tuple else usual
        return self.usual[name]

    def typical(self, name, values):
        """Returns the mean, or the peak, which only one in the last twenty exceeded."""
        if name == "peak":
            last = sorted(values[-20:])
            return int(last[-1 - len(last) // 20])
        return sum(values) / len(values)

    def note(self, values, value):
        """Adds a value to the last ones, and drops the first where there are too many."""
        values.append(value)
        del values[:-self.MEMORY]


LEARN_SHARE = 0.05  # of the calls of a caller that is well known: counting takes time


class CostEstimator:
    """What calls cost, by unit: estimated before, known after. An estimate counts characters; how
    many of them make a token, and how much a model says, is learned from calls that report their
    usage."""
    NO_TEXT = 2048      # bytes of a response that are not worth counting

    def __init__(self, config: Config, prices: Prices, units: Set[str]):
        """`units` are those that rules count in: no work is spent on others."""
        self.prices = prices
        self.request_cost = 1 if config.limits else config.request_token_cost
        # How many output tokens a call may have that does not limit them, as long as its model was
        # not seen to use more.
        self.reserve = config.response_token_reserve
        self.media_tokens = config.image_tokens
        self.units = units
        self.models: "OrderedDict[str, ModelHabits]" = OrderedDict()  # by folded name
        self.unknown = ModelHabits()
        self.one_request = self.costs(Usage(), 0, 0, 1)
        self.needs_price = "usd" in units
        self.needs_estimate = not units <= {"requests", "running"}
        self.needs_usage = not units <= {"requests", "running", "estimate"}

    def habits(self, call):
        return self.models.get(fold_model(call.upstream_model), self.unknown)

    def estimate(self, call: "Call", caller: CallerKey) -> Tuple[Costs, Costs]:
        """Returns what to hold for a call, and how much of that is not learned."""
        limit, outputs = call.output_limit()
        output = self.reserve if limit is None else limit
        estimate = 0
        if "estimate" in self.units:
            estimate = max(1, self.tokens_of(call.prompt_length(), CHARACTERS_PER_TOKEN)
                           + min(MAX_TOKENS_PER_CALL, output * outputs))
        prompt = self.estimated_input(call, caller)
        least = held = self.held(call, prompt, output * outputs, estimate)
        if not limit:
            peak = self.habits(call).expect(caller, "peak") or self.last_peak(caller)
            if peak > output:
                held = self.held(call, prompt, peak * outputs, estimate)
        return held, least

    def last_peak(self, caller):
        """Returns the output to expect of an unknown model: that of the models called last, as a
        server may answer to any name."""
        models = islice(reversed(self.models.values()), 8)
        return max([model.expect(caller, "peak") for model in models], default=0)

    def held(self, call, prompt, output, estimate):
        used = Usage(prompt, min(output, MAX_TOKENS_PER_CALL))
        picodollars = 0
        if self.needs_price:
            # A cheaper tier that is asked for is not always what serves.
            picodollars = max([self.prices.cost(used._replace(tiers=tiers), name)[0]
                               for name in call.models for tiers in {(), call.tiers()}])
        return self.costs(used, picodollars, estimate, 1)

    def estimated_input(self, call, caller):
        length = call.prompt_length()
        return self.tokens_of(length, self.ratio(call, caller, "input", length[2]))

    def ratio(self, call, caller, side, kind):
        """Returns the weight of a text for each of its tokens."""
        name = side, kind.number
        return self.habits(call).expect(caller, name, CHARACTERS_PER_TOKEN) * kind.scale

    def tokens_of(self, length, ratio):
        """Returns the tokens of a prompt."""
        weight, media, _ = length
        return ceil(weight / ratio) + sum(
            [max(self.media_tokens, ceil(one / ratio)) for one in media])

    def costs(self, used: Usage, picodollars: int, estimate: int, running: int = 0) -> Costs:
        """Returns the costs in the order of UNITS."""
        prompt, output = used[:2]
        return self.request_cost, prompt + output, prompt, output, picodollars, running, estimate

    def usage(self, call: "Call", caller: CallerKey, source: Optional["UsageReader"], whole: bool,
              held: int) -> Usage:
        """Returns what the call used: as reported, else estimated from its prompt and the text that
        came, and the share of it that its model hides. A response that is not `whole` may have
        reported its input alone; where it was not seen to end, its output is `held` at least."""
        reported, complete = source.reported_usage(whole) if source else (None, False)
        if complete and not (
                self.needs_estimate and self.is_understated(call, caller, reported, source)):
            if reported.estimated:  # its input was not reported
                return reported._replace(
                    input=max(reported.input, self.estimated_input(call, caller)))
            # Where no rule counts tokens, what is learned is for the books alone.
            if self.needs_estimate or random.random() < LEARN_SHARE:
                self.learn(call, caller, reported, source)
            return reported
        used = reported or Usage(
            self.estimated_input(call, caller), model=source and source.model,
            tiers=(source.tier,) if source and source.tier else ())
        output = self.output_seen(call, caller, source, whole, held)
        return used._replace(output=max(used.output, output), estimated=True)

    def output_seen(self, call, caller, source, whole, held):
        """Returns the tokens of the text that came, and of what its model hides."""
        if not source:
            return held
        weight = source.output_characters()  # finds its kind, too
        output = ceil(weight / self.ratio(call, caller, "output", source.kind))
        limit, outputs = call.output_limit()
        ended = source.ended if outputs == 1 else source.closed  # one of several ends first
        if not (whole or ended) or (source.lost and held):
            return max(output, held)
        habits = self.habits(call)
        # Twice what such calls used: a share near 1 would make a million tokens of a long answer.
        most = min(limit or inf, 2 * habits.expect(caller, "peak")) * outputs
        return max(output, min(most, ceil(output / (1 - habits.expect(caller, "hidden")))))

    def is_understated(self, call, caller, told, source):
        """Returns whether far more text passed than the tokens that were told can be. The text is
        counted only where it may be so much, or servers are known to tell too little."""
        _, outputs = call.output_limit()
        # llama.cpp tells the tokens of one output, however many it made: half of them, of two.
        times = min(2, math.sqrt(outputs)) if outputs > 1 else 2
        most = max(times * told.output, told.output + 64)
        passed = source.most_characters() - self.NO_TEXT
        if outputs == 1 and passed <= most * CHARACTERS_PER_TOKEN:
            return False  # the usual case
        weight = source.output_characters()
        ratio = self.ratio(call, caller, "output", source.kind)
        return weight > most * max(ratio, CHARACTERS_PER_TOKEN)

    def learn(self, call, caller, used, source):
        """Notes what a call used. An output that its limit has cut says only what is possible."""
        name = fold_model(call.upstream_model)
        model = self.models.get(name) or put_newest(
            self.models, name, ModelHabits(), KNOWN_MODELS)
        own = model.callers.get(caller) or put_newest(
            model.callers, caller, defaultdict(partial(array.array, "d")), model.CALLERS)
        limit, outputs = call.output_limit()
        if self.needs_estimate and (
                not limit or used.output > model.expect(caller, "peak") * outputs):
            model.note(own["peak"], used.output // outputs)
        lessons = list(self.lessons(call, own, used, source))
        for habit, value in lessons:
            model.note(own[habit], value)
        if lessons or random.random() < LEARN_SHARE:
            self.models.move_to_end(name)  # often enough for models that are called often
            model.callers.move_to_end(caller)
            model.usual.clear()

    @staticmethod
    def teaches(values):
        """Returns whether a call is of use, by what is known of its caller."""
        return len(values) < ModelHabits.MEMORY or random.random() < LEARN_SHARE

    def lessons(self, call, own, used, source):
        """Yields (habit, value), from long texts alone: in short ones the words around them would
        count too much."""
        bounds = ModelHabits.OWN_RATIOS
        if self.needs_estimate and used.input:
            weight, media, kind = call.prompt_length()
            name = "input", kind.number
            if weight >= 64 and not media and self.teaches(own[name]):
                yield name, clamp(weight / kind.scale / used.input, bounds)
        if used.output < 16 or not self.teaches(own["hidden"]):
            return
        weight = source.output_characters() / source.kind.scale
        if weight:
            seen = max(1, used.output - used.reasoning)
            if weight > CHARACTERS_PER_TOKEN * math.sqrt(seen * used.output):
                seen = used.output  # reasoning is in the text, which is too long to be without
            elif weight < seen * bounds[0]:
                seen = ceil(weight / CHARACTERS_PER_TOKEN)  # nobody told how much was hidden
            yield "hidden", min(0.9999, 1 - seen / used.output)
            yield ("output", source.kind.number), clamp(weight / seen, bounds)


# --------------------------------------------------------------------------------------------------
# Dialects: the only place that knows an API's wire names: which paths are metered, where the prompt
# stands, how streams are cut into events, what usage, errors, limit replies and lists of models
# look like. It knows no sockets and no buckets. A new API is a class here and its row in DIALECTS.
# --------------------------------------------------------------------------------------------------

# CPython 3.13's parser overruns a thread's stack long before it raises RecursionError.
MAX_JSON_DEPTH = 128
# Brackets, quotes, colons and the like outside of strings; a comma counts half. All of them take 30
# ms to read, in which nothing else runs, and 40 times their size in memory.
MAX_JSON_PARTS = 160_000
# The same and back slashes, in strings, too: these are 10 MB of prose.
MAX_JSON_MARKS = 4_000_000
MAX_BACK_SLASHES = 1_000_000  # an escape takes ten times as long as another character
LONG_NUMBER = 640     # digits; an integer of more takes too long to read
# Nothing else need be looked at. The letters are those that may follow a back slash.
MARKS = b'[{]}"\\,:.ebfnrtu'
NO_MARKS = bytes(set(range(256)) - set(MARKS))
STEPS = bytes.maketrans(MARKS, b"\1\1\xff\xff" + bytes(12))


def is_too_complex(data):
    """Returns whether JSON is nested too deeply or would take too long to read; that is one search
    of linear passes. For JSON that is not valid this holds up to where a parser would stop."""
    marks = data.translate(None, NO_MARKS)
    if len(marks) > MAX_JSON_MARKS or marks.count(b"\\") > MAX_BACK_SLASHES:
        return True
    marks = marks.replace(b"\\\\", b"").replace(b'\\"', b"")
    if marks.count(b'"') > MAX_JSON_PARTS:
        return True
    outside = b'""'.join(marks.split(b'"')[::2])
    commas = outside.count(b",")
    if len(outside) - commas // 2 > MAX_JSON_PARTS:
        return True
    levels = itertools.accumulate(array.array("b", outside.translate(STEPS)))
    return MAX_JSON_DEPTH + 1 in levels  # levels change by one


def unique(pairs):
    """Returns an object of JSON. Two parsers may disagree on which of two equal keys counts."""
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key stands twice")
    return value


def finite(text):
    """Returns a number of JSON, which is none of the NaN and Infinity that Python would read."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number is out of range")
    return value


def short_integer(text):
    """Returns an integer of JSON: to read one of thousands of digits takes long."""
    if len(text) > LONG_NUMBER:
        raise ValueError("a number is too long")
    return int(text)


def with_cuts(sizes, pairs):
    """Returns an object of JSON in which what was cut out says so; `sizes` are by mark."""
    return {key: cut_text(value, sizes) for key, value in unique(pairs).items()}


def cut_text(value, sizes):
    if type(value) is list:
        return [cut_text(one, sizes) for one in value]
    if type(value) is str and value[32:] in sizes:
        value = CutText(value)
        value.size = sizes[value[32:]]
    return value


HAS_DIGIT_LIMIT = hasattr(sys, "set_int_max_str_digits")  # older releases of 3.9, 3.10 have none
if HAS_DIGIT_LIMIT:
    sys.set_int_max_str_digits(LONG_NUMBER)


def strict_decoder(hook):
    parse_int = int if HAS_DIGIT_LIMIT else short_integer  # which takes ten times as long
    return json.JSONDecoder(object_pairs_hook=hook, parse_float=finite, parse_int=parse_int,
                            parse_constant=finite)


BYTE_ORDER_MARK = b"\xef\xbb\xbf"
HAS_SCANNER = json.scanner.c_make_scanner is not None
PLAIN_JSON = json.JSONDecoder()
STRICT_JSON = strict_decoder(unique)


KEY_END = re.compile(r'"\s*:')  # may also match inside a string


def was_strict(text, value):
    """Returns whether the JSON that was read as `value` certainly names no key twice and has no
    number out of range."""
    keys = 0
    values = [value]
    for one in values:  # the list grows as it is walked
        if type(one) is dict:
            keys += len(one)
            values += one.values()
        elif type(one) is list:
            values += one
        elif type(one) is float and not math.isfinite(one):
            return False
    return keys == len(KEY_END.findall(text))


def decode_json(data, decoder=PLAIN_JSON):
    """Reads JSON in UTF-8, in half the time that json.loads takes; raises ValueError."""
    brackets = data.count(b"[") + data.count(b"{")
    if (brackets > MAX_JSON_DEPTH or len(data) > MAX_JSON_PARTS) and is_too_complex(data):
        raise ValueError("nested too deeply, too complex, or not valid JSON")
    try:
        text = data.decode().strip(" \t\r\n")
        if not HAS_SCANNER and decoder in (PLAIN_JSON, STRICT_JSON):
            value = json.loads(text)  # PyPy: ten times as fast
            if decoder is PLAIN_JSON or was_strict(text, value):
                return value
        value, end = decoder.scan_once(text, 0)
        if end == len(text):
            return value
    except (ValueError, StopIteration):
        pass
    raise ValueError("not valid JSON")


# How long a string without spaces must be to be cut out, where it stands at a key of media.
MEDIA_BYTES = 1 << 15
# Keys of which the value is no text, where it has no spaces
DATA_KEYS = set_of("""
    data url image_url video_url audio_url document_url image images audio video file_data file_url
    image_base64 image_embeds audio_embeds bytes bytesBase64Encoded""")
BEFORE_MEDIA = re.compile(
    (r'(?:"(?:%s|b64_json)"\s*:\s*\[?\s*|,\s*)"$' % "|".join(DATA_KEYS)).encode())
# A string without escapes, up to where it may be cut, and whether it is a key; or a bracket
JSON_STEP = re.compile(rb'("[^"]*"?)(\s*:\s*)?|[][{}]')


def without_escapes(data: bytes) -> bytes:
    """Returns JSON, as long as it was, in which a quote is the begin or the end of a string."""
    return data.replace(b"\\\\", b"--").replace(b'\\"', b"--")


# What stands before a key of an object, and between it and its value
BEFORE_KEY = re.compile(r'\ufeff?\s*[{,]\s*(?=")')
COLON = re.compile(r"\s*:\s*")


def members(text):
    """Yields (key, value, its place) of a JSON object, which may be cut. Raises ValueError."""
    step = BEFORE_KEY.match(text)
    while step:
        key, end = PLAIN_JSON.raw_decode(text, step.end())
        step = COLON.match(text, end)
        if step:
            value, end = PLAIN_JSON.raw_decode(text, step.end())
            yield key, value, slice(step.end(), end)
            step = BEFORE_KEY.match(text, end)


class JsonBody:
    """A JSON object as a caller sent it. What is read of it is `short`, from which long strings of
    media were cut out; what is changed is spliced into the bytes: what is large is neither read nor
    spelled again. `cuts` are by the mark that stands for each."""

    def __init__(self, data: bytes):
        self.data = self.short = data
        self.cuts: Dict[bytes, slice] = {}
        if len(data) > 2 * MEDIA_BYTES:
            self.short = self.cut_media()

    def cut_media(self):
        """Cuts out strings of media: a look every MEDIA_BYTES finds each string that spans two of
        them."""
        data = self.data
        self.cuts = {}
        self.secret = b"%016x" % random.getrandbits(64)
        pieces = []
        taken = 0
        start = data.rfind(b'"', 0, MEDIA_BYTES) + 1
        end = data.find(b'"', MEDIA_BYTES)
        while end >= 0:
            if start and end - start > MEDIA_BYTES and self.is_media(start, end):
                mark = b"<%b:%d>" % (self.secret, len(self.cuts))
                pieces += data[taken:start + 32], mark
                self.cuts[mark] = slice(start + 32, end)
                taken = end
            start = data.rfind(b'"', end, end + MEDIA_BYTES) + 1
            end = data.find(b'"', end + MEDIA_BYTES)
        return b"".join((*pieces, data[taken:]))

    def parse(self) -> JsonObject:
        """Raises BadRequest."""
        decoder = STRICT_JSON
        if self.cuts:
            sizes = {mark.decode(): 32 + cut.stop - cut.start for mark, cut in self.cuts.items()}
            decoder = strict_decoder(partial(with_cuts, sizes))
        try:
            payload = decode_json(self.short, decoder)
        except ValueError as error:
            raise BadRequest(f"The request body is {error}") from None
        if not isinstance(payload, dict):
            raise BadRequest("The request body must be a JSON object")
        return payload

    def is_media(self, start, end):
        """Tells whether a long string is media, by the text around it and by its beginning and
        end."""
        data = self.data
        sample = data[start:start + 1024] + data[end - 1024:end]
        return (BEFORE_MEDIA.search(data, start - 64, start) is not None
                and sample.isascii() and data[end + 1:end + 64].lstrip()[:1] != b":"
                and max([data.find(sign, start, end) for sign in b" \\"]) < 0
                # These are what stands between strings.
                and max([data.find(sign, start + 256, end) for sign in b",@;"]) < 0)

    def with_value(self, key, value):
        """Returns the object with another value at one of its keys."""
        text = self.short.decode("latin-1")  # each byte is a character
        place = next(at for name, _, at in members(text) if name == key)
        return self.whole(b"%b%b%b" % (
            self.short[:place.start], to_json_bytes(value), self.short[place.stop:]))

    def whole(self, short: bytes) -> bytes:
        """Returns changed JSON with what was cut out in its place."""
        if not self.cuts:
            return short
        data, pieces, last = memoryview(self.data), [], 0  # so that it is copied only once
        for mark in re.finditer(b"<%b:[0-9]+>" % self.secret, short):
            pieces += short[last:mark.start()], data[self.cuts[mark[0]]]
            last = mark.end()
        return b"".join((*pieces, short[last:]))


def parse_response(data: bytes) -> Any:
    """Reads JSON of an upstream, which may begin with a byte order mark; raises ValueError."""
    return decode_json(data.lstrip(BYTE_ORDER_MARK))


def object_in(data: bytes) -> JsonObject:
    """Returns a JSON object of an upstream, an array of several as its results, {} where there is
    none."""
    try:
        value = parse_response(data)
    except ValueError:
        return {}
    if type(value) is list and value:
        value = {"results": value} if value[1:] else value[0]
    return value if type(value) is dict else {}


LINE = re.compile(rb"[^\r\n]*")


def begin_of_line(data, place):
    """Returns where the line that holds a place begins."""
    return max(data.rfind(b"\n", 0, place), data.rfind(b"\r", 0, place)) + 1


def to_json_bytes(payload: Any) -> bytes:
    """Returns JSON without white space."""
    return json.dumps(payload, separators=(",", ":")).encode()


def read_string(spelled):
    """Returns what stands between the quotes of a string of JSON; what is no valid one is read as
    it stands."""
    if "\\" in spelled:
        with suppress(ValueError):
            return json.loads(f'"{spelled}"')
    return spelled


def dig(value, *names):
    """Returns what stands at these names in objects within objects, None where nothing does."""
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value


# RFC 2046 5.1.1; what could be taken for two boundaries is none.
FORM_TYPE = re.compile(
    r'multipart/form-data\s*;\s*(?:charset=[^;"]*;\s*)?boundary='
    r'(?:"([^"\\]{1,70})"|([^\s;"\\]{1,70}))\s*(?:;\s*charset=[^;]*)?', re.IGNORECASE)
FIELD_HEAD = re.compile(rb"""
    \r\n(?:(?!.*content-disposition)[^\r\n]+\r\n)*
    content-disposition:[ \t]*form-data;[ \t]*name=(?:"([^"\\\r\n]*)"|([^\s;"\\]+))
    [ \t]*(?:(?=;)(?:(?!;[ \t]*name\b)[^\r\n])*)?
    (?:\r\n(?!.*content-disposition)[^\r\n]+)*\r\n\r\n""", re.IGNORECASE | re.VERBOSE)
MAX_FORM_FIELDS = 1000
MAX_FIELD_HEAD = 4096
MAX_QUERY = 65536


def form_fields(body, content_type):
    """Yields (name, start, end of its value) of each field of a form (RFC 7578). Raises BadRequest
    for what two readers might take apart differently."""
    boundary = FORM_TYPE.fullmatch(content_type)
    mark = b"--" + (boundary[boundary.lastindex] if boundary else "").encode("latin-1")
    at = len(mark) if body.startswith(mark) else len(body)
    for _ in range(MAX_FORM_FIELDS):
        end = body.find(mark, at)
        if boundary and end < 0 and body[at:at + 2] == b"--":
            return
        head = FIELD_HEAD.match(body, at, min(end, at + MAX_FIELD_HEAD))
        if not head or body[max(head.end(), end - 2):end] != b"\r\n":
            break
        name = head[head.lastindex].decode("latin-1")
        if name == "model" and b"encoding:" in head[0].lower():
            break
        yield name, head.end(), end - 2
        at = end + len(mark)
    raise BadRequest("The request body is not a plain form as its Content-Type says")


def query_fields(body):
    """Yields the fields of a form in the shape of a query, as `form_fields` does."""
    if len(body) > MAX_QUERY:
        raise BodyTooLarge
    for field in re.finditer(b"([^=&]+)=?([^&]*)", body):
        yield (urllib.parse.unquote_plus(field[1].decode("latin-1")), *field.span(2))


def read_form(body, content_type, named):
    """Returns the model that a form names, and what makes the form with another one, None and None
    where it names none. Puts into `named` what it says of stored things. Raises BadRequest."""
    kind = content_type.lower()
    decode = encode = str
    fields = ()
    if kind.startswith("multipart/form-data"):
        fields = form_fields(body, content_type)
    elif kind.startswith("application/x-www-form-urlencoded"):
        fields = query_fields(body)
        decode, encode = urllib.parse.unquote_plus, urllib.parse.quote_plus
    model = place = None
    for name, start, end in fields:
        keys = REFERENCES.intersection(re.split(r"[][.]+", name))  # such as images[0][file_id]
        is_model = name.lower() == "model"
        if keys or is_model:
            value = decode(body[start:end].decode("utf-8", "replace"))
        for key in keys:
            named.setdefault(key, []).append(value)
        if is_model:
            if place or name != "model":
                raise BadRequest("The field model must stand once in the form, and plainly")
            model, place = value, (body[:start], body[end:])
    return model, place and (lambda other: encode(other).encode().join(place))


def objects_in(value, values_of=dict.values):
    """Returns the objects in a value of JSON, outer ones first. What else to look at in one is
    what `values_of` returns of it; None leaves it out."""
    objects = []
    parts = [value]
    for part in parts:  # the list grows as it is walked
        if type(part) is list:
            parts += part
        elif type(part) is dict:
            values = values_of(part)
            if values is not None:
                objects.append(part)
                parts += values
    return objects


def as_list(value):
    """Returns a list as it is, and anything else as the only one in a list."""
    return value if isinstance(value, list) else [value]


def is_integer(value):
    """Returns whether a value of JSON is an integer: some write 12.0."""
    return type(value) in NUMBERS and value % 1 == 0


def is_count(value):
    """Returns whether a value of JSON can be a number of tokens."""
    return is_integer(value) and 0 <= value < MAX_TOKENS_PER_CALL


def merged(before, after, join=max):
    """Returns two reports of usage as one. Amounts only grow, so the larger of two is taken."""
    report = {**before, **after}
    for name in before.keys() & after.keys():
        if type(after[name]) is int:
            report[name] = join(before[name], after[name])
    return report


PLAIN_PATH = re.compile(r"(?:/[A-Za-z0-9_~:@-][A-Za-z0-9_.~:@=-]*)+")


def fold_path(path):
    """Returns a path as the most forgiving upstream might read it: escapes decoded again and again,
    back slashes turned, parameters, empty and dot segments dropped, lower case. Raises
    BadRequest."""
    if PLAIN_PATH.fullmatch(path):
        return path.lower()
    for _ in range(8):
        path = urllib.parse.unquote(path, "latin-1")
    path = path.replace("\\", "/").lower()
    if re.search(r"(?:^|/)\s*\.\.\s*(?:[/;?#]|$)", path):
        raise BadRequest("The path must not contain dot segments")
    path = re.sub(r"(?s)[?#].*|;[^/?#]*", "", path)
    segments = [segment.strip() for segment in path.split("/")]
    if re.search("[\0-\x1f\x7f]", "".join(segments)):
        raise BadRequest("The path must not contain control characters")
    return "".join(["/" + segment for segment in segments if segment not in ("", ".")])


class EventFraming(NamedTuple):
    """Says how the streams of an API are cut into events."""
    content_type: str        # how that of a stream begins
    prefix: bytes            # of the line with an event's JSON
    ends: Tuple[bytes, ...]  # what may end an event, our own first
    MOST_LINES = 16  # of an event that a line may end: each is read anew

    def comment(self, text: str) -> bytes:
        """Returns what clients skip, where the dialect TAKES_COMMENTS."""
        return b": " + text.encode() + self.ends[0]

    def event(self, data: bytes, first_line: bytes = b"") -> bytes:
        """Returns an event of one line of JSON, or of one with its name before it."""
        return first_line + self.prefix + data + self.ends[0]

    def at_boundary(self, tail: bytes) -> bool:
        """Returns whether something can be inserted after `tail`, the last 4 bytes that passed."""
        return not tail or tail.endswith(self.ends)

    def data(self, line: bytes) -> Optional[bytes]:
        """Returns the part of an event's JSON that a line holds, None for another line."""
        prefix = self.prefix.rstrip()  # others leave out the space
        return line[len(prefix):] if line.startswith(prefix) else None

    def payload(self, event: bytes) -> JsonObject:
        """Returns the JSON object of an event or its line, {} where there is none."""
        return object_in(self.all_data(event))

    def all_data(self, event):
        """Returns the JSON of an event or its line."""
        lines = map(self.data, event.lstrip(BYTE_ORDER_MARK).splitlines())
        return b"\n".join([data for data in lines if data is not None])

    def replaced(self, event: bytes, data: bytes) -> bytes:
        """Returns an event with other JSON in it."""
        lines = event.splitlines(keepends=True)
        end = lines[-1][len(lines[-1].rstrip(b"\r\n")):] or self.ends[0][:1]
        rest = [line for line in lines if self.data(line) is None]
        rest.insert(sum(map(bool, map(bytes.strip, rest))), self.prefix + data + end)
        return b"".join(rest)

    def again(self, event: bytes, data: bytes) -> bytes:
        """Returns a second event of the same kind, with other data."""
        return self.replaced(event, data).rstrip(b"\r\n") + self.ends[0]

    def split(self, data: bytes) -> List[bytes]:
        """Returns the events that are whole, and, last, the rest."""
        end = self.ends[0]
        if data.endswith(end) and data.find(end) == len(data) - len(end) and (
                data.count(self.prefix.rstrip()) == 1 and data.find(b"\r") < 0):
            return [data, b""]  # the usual case
        events, lines = [], []
        for line in data.splitlines(keepends=True):
            is_blank = not line.strip(b"\r\n")
            if lines and not is_blank and self.is_whole(lines):
                events.append(b"".join(lines))
                lines.clear()
            lines.append(line)
            if is_blank:
                events.append(b"".join(lines))
                lines.clear()
        rest = b"".join(lines)
        if rest.endswith((b"\n", b"\r")) and self.is_whole(lines):
            return [*events, rest, b""]
        return [*events, rest]

    def is_whole(self, lines):
        """Returns whether lines are all of an event's, though none is empty: some servers end
        events with a line, or the rest is still to come."""
        if not self.prefix:
            return True
        last = (self.data(lines[-1]) or b"").strip()
        return len(lines) <= self.MOST_LINES and (
            last == LAST_DATA or last.endswith(b"}") and bool(self.payload(b"".join(lines))))


NO_BRACES = bytes({*range(256)}.difference(b"{}"))


class ArrayFraming(EventFraming):
    """Cuts a JSON array into the objects in it; what stands before one belongs to it."""
    __slots__ = ()

    def at_boundary(self, tail: bytes) -> bool:
        return not tail or (tail.endswith(b"}") and bool(self.payload(tail)))

    def all_data(self, event):
        return event.lstrip(b"[], \t\r\n")

    def replaced(self, event: bytes, data: bytes) -> bytes:
        return event[:len(event) - len(self.all_data(event))] + data

    def again(self, event: bytes, data: bytes) -> bytes:
        return b",\n" + data

    def split(self, data: bytes) -> List[bytes]:
        unescaped = without_escapes(data)
        # Those outside of strings.
        braces = b"".join(unescaped.split(b'"')[::2]).translate(None, NO_BRACES)
        if 0 not in itertools.accumulate(map((124).__sub__, braces)):  # { adds 1, } takes 1 away
            return [data]  # much faster than step by step
        ends = [0]
        depth = 0
        for step in JSON_STEP.finditer(unescaped):
            if step[0] in b"{}":
                depth += 1 if step[0] == b"{" else -1
                if not depth:
                    ends.append(step.end())
        return [data[start:end] for start, end in zip(ends, [*ends[1:], None])]


LAST_DATA = b"[DONE]"  # of OpenAI's streams, and no JSON
EVENT_END = re.compile(rb"[}\]]")  # in comments and framing there is neither
# WHATWG HTML, 9.2: a line ends with LF, CR or both, an event with an empty line.
SSE = EventFraming(
    "text/event-stream", b"data: ", (b"\n\n", b"\n\r\n", b"\r\r\n", b"\r\r", b"\n\r"))
# Each line is an event.
NDJSON = EventFraming("application/x-ndjson", b"", (b"\n",))
LINES_OF_JSON = NDJSON.content_type, "application/stream+json"  # the latter is Cohere's
JSON_ARRAY = ArrayFraming("application/json", b"", (b"}",))


UNKNOWN = "unknown"  # the endpoint of a call that costs something and is not known otherwise
UPLOAD = "upload"    # the endpoint of a file to be stored
UNNAMED = (UNKNOWN, UPLOAD)


class StoredPath(NamedTuple):
    """What a path says of a thing that an upstream stores. `name` is empty where the path is that
    of all its kind; `is_listed`: they are asked for, and none is made."""
    collection: str
    name: str
    is_listed: bool


LARGE_BODY = 8192  # bytes from which reading a body takes its time, and its payload much room
MAX_MODEL = 256    # characters of a model's name


class Call:
    """One LLM request, parsed. `endpoint` is None where nothing is metered. `body` is None where it
    is relayed as it comes; there is a payload where it is JSON. `prefix` names the upstream where
    the path did. `model` is what the caller asked for, `resolved_model` what that stands for, and
    `upstream_model` what the upstream is asked for, in `upstream_body`; `models` are that and
    those that may serve instead. `put_model` returns a form with another model in it."""
    model: Optional[str] = None
    resolved_model = ""
    upstream_model = ""
    models: Tuple[str, ...] = ()
    body: Optional[bytes] = None
    upstream_body: Optional[bytes] = None
    json_body: Optional[JsonBody] = None
    put_model: Optional[Callable[[str], bytes]] = None
    trace: Optional["Trace"] = None
    stream = False
    usage_requested_by_us = False  # the caller did not ask for the usage
    # What it asks for, once that is known:
    limit: Optional[Tuple[Optional[int], int]] = None
    large = False      # its body is large
    is_plain = False   # it asks for nothing but an answer to messages
    length = None      # of the prompt; computed when it is asked for

    def __init__(self, dialect: "Dialect", endpoint: Optional[str], path: str, query: str,
                 prefix: Optional[str] = None, stored: Optional[StoredPath] = None):
        self.dialect = dialect
        self.endpoint = endpoint
        self.prefix = prefix
        self.stored = stored
        self.path = path
        self.query = query
        self.payload: JsonObject = {}
        self.unmetered = endpoint in (None, "count")  # counting is read for its model alone
        # What is read for every call is not left to the class: CPython would look there last.
        self.forgotten = False  # large parts of the payload were dropped
        self.masked: Optional[JsonObject] = None  # the payload with placeholders
        self.masks: Optional["Masks"] = None      # the values behind the placeholders
        self.made: Sequence[str] = ()  # names of the stored things that its response made
        self.on_made = None            # callback: gets them
        # A call in the background whose usage nobody knows yet, where this asks for its answer
        self.owes: Optional["Call"] = None

    def __repr__(self) -> str:
        return "<Call %s %s, model %r as %r%s>" % (
            self.dialect.name, self.endpoint, self.model, self.upstream_model,
            ", streamed" if self.stream else "")

    def prepare_for(self, model: str, rewrite: Optional[Callable[[Dict], Dict]],
                    rename: Optional[Callable[[str], str]]) -> None:
        """Fits the call to an upstream, which is asked for `model`; `rewrite` returns the payload
        as it must be there, and `rename` the name of another model, None where none may serve."""
        if self.forgotten:
            self.remember()
        self.upstream_model = model
        self.upstream_body = self.body
        self.usage_requested_by_us = False
        self.models = (model,)
        if self.is_plain and model == self.model == self.payload.get("model") and not (
                rewrite or self.masked):
            return  # the usual case
        payload = self.masked or self.payload
        self.masked = None
        if not self.dialect.MODEL_LISTS.isdisjoint(payload):
            payload, others = self.dialect.with_other_models(payload, rename)
            self.models += tuple(others)
        if self.endpoint in UNNAMED:
            return self.prepare_unknown(model, payload, rename or (lambda name: model))
        if not model == self.model == payload.get("model"):
            self.path, payload = self.dialect.with_model(self.path, payload, model)
        if rewrite:
            payload = rewrite(payload)
        if payload is not self.payload:
            self.spell(payload)

    def spell(self, payload):
        """Puts a changed payload into the upstream's body: a model alone is spliced in."""
        before = self.payload
        changed = [key for key in {**before, **payload} if payload.get(key) is not before.get(key)]
        if changed == ["model"] and "model" in before and payload.get("model"):
            self.upstream_body = self.json_body.with_value("model", payload["model"])
        elif changed:
            self.upstream_body = self.json_body.whole(to_json_bytes(payload))

    def prepare_unknown(self, model, payload, rename):
        """Replaces the models that a call of an unknown endpoint names; it may be a batch of
        calls."""
        renamed = json.loads(to_json_bytes(payload))
        named = []
        for one in objects_in(renamed):
            if is_name(one.get("model")):
                named.append(one["model"])
                one["model"] = rename(one["model"])
        if named != [self.model]:
            self.models = tuple(self.dialect.few([*self.models, *map(rename, named)]))
        if renamed != payload:
            payload = renamed
        if self.model:
            self.path, payload = UNKNOWN_DIALECT.with_model(self.path, payload, model)
        if self.json_body:
            self.spell(payload)
        elif self.put_model and model != self.model:
            self.upstream_body = self.put_model(model)

    def runs_in_background(self) -> bool:
        """Returns whether its answer is only told to a later call that asks for it."""
        return True in map(self.payload.get, LATER) or (
            self.endpoint == UNKNOWN and bool(LATER_PATH.search(self.path)))

    def makes_things(self) -> bool:
        """Returns whether the upstream may store what comes of it, for the account."""
        if self.endpoint == "chat":
            return True in map(self.payload.get, KEPT)
        if self.stored and self.stored.collection in HAVE_RESULTS and self.stored.name:
            return self.path.endswith("/" + self.stored.name)
        if self.endpoint == "messages":  # some of Anthropic's tools run in containers it names
            return bool(CONTAINED_TOOL.search(self.json_body.short))
        return self.endpoint in ("responses", "interactions", UNKNOWN, UPLOAD) or (
            self.endpoint == "other" and "/video" in self.path)

    def references(self) -> List[str]:
        """Returns the names of stored things that the payload speaks of."""
        if self.json_body and not may_refer(self.json_body.short):  # the usual case
            return []
        names = []
        is_chat = self.endpoint == "chat"
        meant = REFERENCES - CONVERSATIONS if is_chat else REFERENCES
        for part in objects_in(self.payload, says_of_things):
            for key in meant.intersection(part):
                names += names_of_things(part[key], key)
            kind = part.get("type")
            if kind in ALL_STORED and "source" not in part and self.stored and (
                    self.stored.collection.lower() == "evals"):
                names.append("/")  # nobody's
            if kind in REFERENCE_TYPES or (
                    kind is None and not is_chat and part.keys() <= {"id", "type"}):
                names += names_of_things(part)
        return names

    def prompt_length(self) -> Tuple[int, List[int], TextKind]:
        """Returns the weight of the prompt's text, and of that in each image and the like, and what
        kind of text it is."""
        if self.length is None:
            payload = self.payload
            if self.is_plain and not self.json_body.cuts:
                self.length = chat_length(payload.get("messages"))
                if self.length:  # the usual case
                    return self.length
            self.length = text_length(payload)
        return self.length

    def output_limit(self) -> Tuple[Optional[int], int]:
        """Returns the most tokens of one output, None where the call does not limit them, and how
        many outputs it asks for: one for each answer and prompt. The largest limit counts that any
        server takes for one; null is unsaid, as at OpenAI, and -1 none, as at llama.cpp."""
        if self.limit is None:
            most = self.payload.get("max_tokens")
            if self.endpoint == "chat" and UNUSUAL_NUMBERS.isdisjoint(self.payload) and (
                    most is None or type(most) is int):  # the usual case
                self.limit = most if most is None or most >= 0 else None, 1
            else:
                self.limit = self.find_output_limit()
        return self.limit

    def find_output_limit(self):
        limits, answers, prompts = [], 1, self.count_prompts()
        for name, value in self.numbers():
            if name in OUTPUT_LIMITS:
                limits.append(inf if value < 0 else min(value, MAX_TOKENS_PER_CALL))
            elif value > answers:
                answers = value
        most = max(limits, default=None)
        if self.endpoint in UNNAMED and (limits or not self.runs_in_background()):
            # It may be a batch of calls, each prompt have a limit of its own, or have no output.
            most = max(most or 0, sum(limits) / prompts)
        elif most is not None:
            thinking = [dig(self.payload, *path) for path in THINKING_LIMITS]
            most += max(filter(is_count, thinking), default=0)
        return None if most in (None, inf) else ceil(most), answers * prompts

    def count_prompts(self):
        names = {"messages"} if self.endpoint == "batch" else PROMPTS
        return math.prod([len(many) for many in map(self.payload.get, names)
                          if type(many) is list and many and type(many[0]) in HOLD_WORDS])

    def tiers(self) -> Tuple[str, ...]:
        """Returns the service tiers that it asks for."""
        return tuple(filter(is_name, map(self.payload.get, self.dialect.TIERS)))

    def holders(self):
        """Returns the objects in which limits may stand; of an unknown call, all objects."""
        if self.endpoint == UNKNOWN:
            return objects_in(self.payload)
        options = list(filter(None, map(self.payload.get, OPTION_HOLDERS)))
        if not {dict}.issuperset(map(type, options)) and self.endpoint not in NO_LIMIT_REPLY:
            raise BadRequest("generationConfig, options and the like must be objects")
        return [self.payload, *[one for one in options if type(one) is dict]]

    def numbers(self):
        """Returns what stands at the names of limits and counts, as (name, value). Raises
        BadRequest for what is no number where text is generated: a server might read it as one."""
        numbers = []
        for one in self.holders():
            for name in OUTPUT_NUMBERS.intersection(one):
                value = one[name]
                if is_integer(value):
                    numbers.append((name, int(value)))
                elif value is not None and self.endpoint not in NO_LIMIT_REPLY:
                    raise BadRequest(f"{name} must be an integer")
        return numbers

    def remember(self):
        """Undoes `forget`."""
        self.payload = self.json_body.parse()
        self.forgotten = False

    def is_opaque(self) -> bool:
        """Returns whether a call with a body holds or continues what cannot be read in it, or has
        an answer that outlives it."""
        return not self.json_body or self.runs_in_background() or bool(self.references())

    def drop(self):
        """Drops what is not needed any more when it has ended."""
        self.payload = self.body = self.upstream_body = self.put_model = None
        self.json_body = self.masked = self.masks = None

    def forget(self):
        """Drops what is large of the payload, once it is known what the call asks for: it takes 40
        times the room of its bytes, and the call may wait long."""
        if self.json_body:
            self.prompt_length()
            with suppress(BadRequest):
                self.output_limit()
            self.payload = {key: value for key, value in self.payload.items() if is_small(value)}
            self.forgotten = True


def is_small(value):
    """Tells whether a part of a payload takes little room."""
    parts = [value]
    size = 0
    for part in parts:  # the list grows as it is walked
        size += len(part) if isinstance(part, str) else 8
        if size > 1024:
            return False
        if type(part) is dict:
            parts += [*part, *part.values()]
        elif type(part) is list:
            parts += part
    return True


# Keys that are true in a call whose answer is only told later, and in one whose answer is stored
LATER = ("background", "deferred")
KEPT = frozenset((*LATER, "store"))
LATER_PATH = re.compile(
    "(?i)/(?:batch(?:es|PredictionJobs|/jobs)|evals/[^/]+/runs)/*$|:batchGenerateContent$|/async/")
# The most tokens of an output, at servers of any kind: a caller may name several, and the server
# may take any of them.
OUTPUT_LIMITS = set_of("""
    max_tokens max_completion_tokens max_output_tokens maxOutputTokens max_new_tokens n_predict
    num_predict max_tokens_to_sample max_gen_len maxTokens maxTokenCount max_length
    max_tokens_to_generate tokens_to_generate maximum_tokens min_tokens
    min_new_tokens""")
# The same, and how many answers there are to one prompt.
OUTPUT_NUMBERS = OUTPUT_LIMITS.union("""
    n best_of n_cmpl candidateCount candidate_count num_return_sequences num_generations
    numResults sampleCount""".split())
# Lists of these are several prompts: each has an output.
PROMPTS = set_of("prompt prompts text inputs input_ids instances")
# The objects in which either may stand.
OPTION_HOLDERS = set_of(
    "generationConfig generation_config options parameters inferenceConfig")
# Where the most tokens of thinking stand, which some servers add to those of the output: Google's,
# OpenRouter's and Alibaba's.
THINKING_LIMITS = [path.split(".") for path in """
    generationConfig.thinkingConfig.thinkingBudget generationConfig.thinkingConfig.thinking_budget
    generationConfig.thinking_config.thinkingBudget generationConfig.thinking_config.thinking_budget
    generation_config.thinkingConfig.thinkingBudget generation_config.thinkingConfig.thinking_budget
    generation_config.thinking_config.thinkingBudget
    generation_config.thinking_config.thinking_budget
    extra_body.google.thinking_config.thinking_budget reasoning.max_tokens thinking_budget
    parameters.thinking_budget chat_template_kwargs.thinking_budget""".split()]
# What may say how much comes out of a chat, but for what nearly all say it by.
UNUSUAL_NUMBERS = (OUTPUT_NUMBERS - {"max_tokens"}).union(
    PROMPTS, OPTION_HOLDERS, next(zip(*THINKING_LIMITS)))
MEDIA_TYPES = set_of("""
    image_url input_image image input_audio audio file input_file document document_url video_url
    input_video video audio_url image_base64 image_embeds audio_embeds
    computer_screenshot""")  # of parts of a prompt: what is in them is no text
IMAGES_KEY = "images"  # in a message, or beside a prompt, at Ollama
MEDIA_OBJECTS = set_of("inlineData inline_data fileData file_data")
MEDIA_KEYS = MEDIA_OBJECTS.union((IMAGES_KEY, "bytes", "bytesBase64Encoded"))  # AWS's; Google's
IS_TEXT = re.compile("(?:data:)?(?:text/|application/(?:json|xml|yaml|javascript)\\b)")
# The keys of prompts, beside those that are text of their own: of what a tool takes and gives.
PLAIN_KEYS = MEDIA_KEYS.union(DATA_KEYS, OUTPUT_NUMBERS, """\
role content type text parts model name description id index function functions parameters arguments
properties items required enum anyOf additionalProperties strict input_schema json_schema schema
tool_calls tool_call_id tool_use_id tool_choice call_id status output input summary thinking
signature cache_control ttl source media_type mimeType mime_type detail format input_audio file
file_id file_uri fileUri filename title context citations annotations logprobs is_error
functionCall functionResponse functionDeclarations args response include_usage effort
budget_tokens""".split())
TEXT_KEYS = PLAIN_KEYS - MEDIA_KEYS - {"type"}  # of parts that are text for sure


# What stands in a call beside its messages: no server reads text there.
PLAIN_CHAT = set_of("""
    messages model stream max_tokens max_completion_tokens temperature top_p seed""")
ROLE, CONTENT = operator.itemgetter("role"), operator.itemgetter("content")


def chat_length(messages):
    """Returns the same as `text_length`, in a third of the time, for messages of nothing but a role
    and a text; None for others."""
    try:
        contents = list(map(CONTENT, messages))
        if sum(map(len, messages)) != 2 * len(contents):
            return None
        text = " ".join(chain(contents, map(ROLE, messages)))
    except (KeyError, TypeError):
        return None
    return text_weight(text), [], kind_of_text(max(contents, key=len, default=""))


def media_texts(part):
    """Returns what is text in a part of a prompt that is an image or the like, in any API, and so
    is the data of a file that says it is text; None where it is none, as Anthropic's documents of
    plain text."""
    if MEDIA_KEYS.isdisjoint(part) and (
            "role" in part or str(part.get("type")) not in MEDIA_TYPES
            or dig(part, "source", "type") in ("text", "content")):
        return None
    texts, data = [], []
    pairs = [("", part)]
    for key, value in pairs:  # the list grows as it is walked
        if isinstance(value, str):
            (data if key in DATA_KEYS and " " not in value else texts).append(value)
        elif type(value) is list:
            pairs += [(key, one) for one in value]
        elif type(value) is dict:
            pairs += value.items()
            texts += value.keys() - PLAIN_KEYS
    if any(map(IS_TEXT.match, texts + data)):
        texts += ["x" * max(len(one), getattr(one, "size", 0)) for one in data]
    return texts


def without_images(part, media):
    """Returns a part of a payload without its images; each adds the weight of its text to
    `media`."""
    if IMAGES_KEY not in part:
        return part
    part = dict(part)
    media += [text_weight(" ".join(media_texts({IMAGES_KEY: image})))
              for image in as_list(part.pop(IMAGES_KEY) or [])]
    return part


def text_length(payload: JsonObject) -> Tuple[int, List[int], TextKind]:
    """Returns the weight of the text anywhere in a payload but the model, joined by spaces: of
    strings, and of keys below the top level that are not an API's own; a list of numbers has as
    many tokens. The second list has the weight of the text in each image and the like. Third comes
    the kind of the longest text."""
    texts, media, rest = [], [], 0
    payload = without_images(payload, media)
    values = [payload[key] for key in payload if key != "model"]
    for value in values:  # the list grows as it is walked
        kind = type(value)
        if kind is str:
            texts.append(value)
        elif kind is list:
            if NUMBERS.issuperset(map(type, value)):
                rest += CHARACTERS_PER_TOKEN * len(value)
            else:
                values += value
        elif kind is CutText:
            rest += value.size + 1
        elif kind is dict:
            if not TEXT_KEYS.issuperset(value):
                value = without_images(value, media)
                strings = media_texts(value)
                if strings is not None:
                    media.append(text_weight(" ".join(strings)))
                    continue
                texts += value.keys() - PLAIN_KEYS
            values += value.values()
    weight = text_weight(" ".join(texts)) + (rest + 1 if texts else rest)
    return max(0, weight - 1), media, kind_of_text(max(texts, key=len, default=""))


# What models read before all else, so that its placeholders stay as they are while a talk grows
READ_FIRST = "tools functions system instructions systemInstruction system_instruction".split()
# What callers make up, and what a tool is given and gives: there keys are somebody's words, too.
TOOL_DATA = set_of("""arguments args input response result output action env metadata
    client_metadata variables""")
ARGUMENTS = "arguments", "args", "input"  # of these, what models give to tools
# Nobody's words: names by which parts of a call are known, and what upstreams have sealed
NOT_WORDS = MEDIA_OBJECTS.union("""images id ids created_at obfuscation type model role signature
    encrypted_content thoughtSignature thought_signature mimeType mime_type media_type fileUri
    file_uri""".split())
ENDS_OF_IDS = ("_id", "_ids", "Id", "Ids")
FILE_NAMES = set_of("displayName display_name")  # keys of names in MEDIA_OBJECTS
NO_PROSE = re.compile(r"(?:(?:data|https?|gs|file):|[A-Za-z0-9+/_=-]{200})\S*")
HOLD_WORDS = frozenset((str, list, dict))


class Words(NamedTuple):
    """A text in a payload: it stands at `key` in `holder`, an object or a list, or is that key,
    which `kind` says, and to which `place` leads: (place of the holder, key)."""
    holder: Any
    key: Union[str, int]
    text: str
    # text; json, in a string; argument, in an object for a tool; key; or echo, which must come back
    # as the upstream said it
    kind: str
    place: Tuple[Any, ...]

    def put(self, text: str) -> None:
        """Replaces the text."""
        if self.kind == "key":
            self.holder[text] = self.holder.pop(self.key)
        else:
            self.holder[self.key] = text

    def is_json(self) -> bool:
        """Returns whether the text is JSON, or begins as such."""
        return self.kind == "json" or bool(MAY_BE_JSON.match(self.text))


# How JSON begins, in Markdown or not, but for arrays of numbers and of arrays
MAY_BE_JSON = re.compile(r'[\s`json]*(?:\{|\[\s*[{"])')
BEFORE_JSON = " \t\r\n`json["
# The keys of text that is JSON, or the ends of such events' types
JSON_TEXTS = "arguments", "partial_json", "arguments.delta"


def is_words(key, value):
    """Tells whether a key of an API's own object may hold text that somebody wrote."""
    if type(value) is dict:  # such as what a tool calls `id`
        return key not in MEDIA_OBJECTS or not FILE_NAMES.isdisjoint(value)
    if key in NOT_WORDS or key.endswith(ENDS_OF_IDS) and not key.startswith("user"):
        return False
    return type(value) is not str or key not in DATA_KEYS or not NO_PROSE.fullmatch(value)


def words_in(payload: JsonObject) -> Iterator[Words]:
    """Yields what persons and tools wrote in a payload, in the order in which it is read. Objects
    and lists within it are copied before they are looked at, so that they may be changed."""
    keys = [key for key in payload if key not in READ_FIRST and is_words(key, payload[key])]
    for key in [*filter(payload.__contains__, READ_FIRST), *keys]:
        yield from words_at(payload, key, (None, key), "")


def words_at(holder, key, place, of_tool):
    """Yields the texts below a key. `of_tool`: the key of a tool's input or output that they are
    part of."""
    value = holder[key]
    keys = ()
    if type(value) is str:
        yield Words(holder, key, value, kind_of_words(holder, key, of_tool), place)
    elif type(value) is dict:
        holder[key] = value = dict(value)
        of_tool = of_tool or (key if key in TOOL_DATA else "")
        if of_tool:
            for name in list(value):
                yield Words(value, name, name, "key", place)
        keys = (name for name in value if of_tool or is_words(name, value[name]))
    elif type(value) is list and not HOLD_WORDS.isdisjoint(map(type, value)):
        holder[key] = value = list(value)
        keys = range(len(value))
    for name in keys:
        yield from words_at(value, name, (place, name), of_tool)


def kind_of_words(holder, key, of_tool):
    if key == "thinking" and "signature" in holder:
        return "echo"
    if key == "arguments":
        return "json"
    return "argument" if of_tool in ARGUMENTS else "text"


def spell_place(place: Tuple[Any, ...]) -> str:
    """Returns where words stand, such as messages.0.content, without keys that may be values."""
    names = []
    while place:
        place, key = place
        names.append(str(key) if re.fullmatch("[A-Za-z_]{1,20}|[0-9]{1,6}", str(key)) else "*")
    return ".".join(reversed(names))


def is_whole_json(data: bytes) -> bool:
    """Returns whether a text is JSON as a whole, which arguments that were cut off are not."""
    try:
        decode_json(data)
    except ValueError:
        return False
    return True


# A string of JSON, which may have no end: else each quote would be tried in vain
JSON_STRING = re.compile('"([^"]*)"?')


def blot_escapes(text: str) -> str:
    """Returns the same as `without_escapes`, without regular expressions: `re` keeps 200 bytes for
    each match that a pattern steps over."""
    return text.replace("\\\\", "--").replace('\\"', "--")


class Model(NamedTuple):
    """A model in a list: its name for callers, and its row as an upstream of `dialect` has it."""
    name: str
    dialect: Optional["Dialect"] = None
    facts: JsonObject = {}


# Keys at which a payload names what an upstream stores
REFERENCES = set_of("""
    previous_response_id response_id previous_interaction_id previousInteractionId conversation
    conversation_id thread_id assistant_id file_id file_ids input_file_id input_file_ids input_files
    training_file validation_file validation_files video_id vector_store_id vector_store_ids
    container container_id cachedContent cached_content fileUri file_uri fileSearchStoreNames
    file_search_store_names eval_id dataset_id library_ids collection_ids memory_store_id vault_ids
    environment_id skill_id prompt video agent uri fileName file_name""")
# At these there may be something else, too: so the names of stored things begin.
MIXED = set_of("skill_id prompt video agent uri fileName file_name")
MIXED_NAME = re.compile("(?:skill|pmpt|video|agent)_|(?:https?://(?=[^/]*google).*/)?files/", re.I)
# Objects of these types name one by their id, as do those that have nothing else.
REFERENCE_TYPES = ("item_reference", "file_id")
# In evals, those of these without a source are all that anybody has stored.
ALL_STORED = ("stored_completions", "responses")
REFERENCE = re.compile(
    ('"(?:%s)"' % "|".join([*REFERENCES, *REFERENCE_TYPES, *ALL_STORED])).encode())
ID_ALONE = re.compile(
    rb'\{\s*(?:"type"\s*:\s*null\s*,\s*)?"id"\s*:\s*"[^"]*"\s*(?:,\s*"type"\s*:\s*null\s*)?\}')
# Here stands what callers and their tools have made up.
CALLERS_OWN = set_of("""
    args arguments functionCall function_call functionResponse function_response parameters
    input_schema inputSchema schema json_schema properties metadata client_metadata plugins
    annotations""")
# Chat has none of these, though some clients name theirs so.
CONVERSATIONS = set_of("conversation conversation_id thread_id assistant_id")
# What an answer has said of its tools, which is told again with the next question.
ECHO = re.compile("tool_use$|_call$|_call_output$|_tool_result$")
# A name of its own, or Gemini's: of a collection and a thing in it, in a URL or not
THING_NAME = re.compile(
    r"(?:https?://(?=[^/]*google)[^/]*/.*/|projects/.*/)?"
    r"((?:files|cachedContents|fileSearchStores)/[^/:?#\s]+)"
    r"|([^/:]+)", re.IGNORECASE)
RESOURCE_NAME = re.compile("(?:.*/)?([A-Za-z]+/[^/:]+)")
NAME_KEYS = """id request_id task_id thread_id output_file_id error_file_id output_file error_file
    responsesFile container_id file_id collection_id""".split()
# Tools of Anthropic that run in containers, by their versions
CONTAINED_TOOL = re.compile(rb'"(?:code_execution|web_search|web_fetch)_[0-9]{8}"')
# These make files when they are done.
HAVE_RESULTS = "batches batch/jobs fine_tuning/jobs".split()
# What an answer says was made may stand in these objects, too.
MADE_IN = """response interaction conversation container file output content annotations
    results delta content_block""".split()


def may_refer(data):
    """Returns whether JSON may name something stored: by one of these words, or where an escape may
    spell one. Quotes in texts, which begin no word, would each be looked at."""
    unquoted = data.replace(b'\\"', b"")
    return data.find(b"\\u") >= 0 or bool(
        REFERENCE.search(unquoted) or ID_ALONE.search(unquoted))


def says_of_things(part):
    """Returns the values in an object that may name stored things, None without any."""
    if "type" in part and ECHO.search(str(part["type"])):
        return None
    if CALLERS_OWN.isdisjoint(part):
        return part.values()
    return [part[key] for key in part.keys() - CALLERS_OWN]


def names_of_things(value, key=""):
    """Returns the names in what stands at one of REFERENCES: a text, an object with an id, or some
    of these."""
    names = [one.get("id") if type(one) is dict else one for one in as_list(value)]
    matches = [THING_NAME.fullmatch(name) for name in names
               if type(name) is str and (key not in MIXED or MIXED_NAME.match(name))]
    return [match[match.lastindex] for match in matches if match]


def names_made(payload):
    """Returns the names of what a response or an event says was made, also by tools of the
    upstream's own."""
    names = []
    for part in objects_in(payload, lambda part: map(part.get, MADE_IN))[:10_000]:
        names += map(part.get, NAME_KEYS)
        names += names_of_things(part.get("result_files"))
        resource = RESOURCE_NAME.fullmatch(str(part.get("name")))
        names.append(resource and resource[1])
    return [name for name in names if type(name) is str and name]


# What may stand before usage, where the beginning is missing: in a response, and in the last event
# of OpenAI's responses API.
OPENINGS = (b"{", b'{"response":{')
# An answer or an event with anything at one of these keys is an error (the latter two are .NET's
# and Apigee's), and so is one with one of these words at one of these.
ERROR_KEYS = "error errors Error fault".split()
FAULT_KEYS = "type event_type object status finish_reason".split()
FAULT = re.compile(r"(?:.*\.)?(?:error|failed)", re.IGNORECASE)
AMOUNT = re.compile(r"[0-9]{0,20}\.?[0-9]{1,20}(?:[eE]-?[0-9]{1,2})?")
# Errors by which an upstream says that its own account is to blame, or else the caller
ACCOUNTS_FAULT = re.compile(
    "rate_limit|quota|exhaust|throttl|balance|permission|authentic|api_?key", re.IGNORECASE)
CALLERS_FAULT = re.compile("invalid|not_found|exceed|too_large|filter|polic|safety", re.IGNORECASE)


# What leaves out parts of a response at Google's servers, or spells it so that nobody can read it
MASK = re.compile(r"\s*\$?(?:fields|callback|alt(?!=(?:sse|json|media)$))\s*(?:=.*)?", re.I | re.S)
# What asks for no more of an answer than what follows an event
GOES_ON = re.compile("(?:^|&)(?:starting_after|last_event_id)=")


# What makes a request another one, at Google's servers and others
OVERRIDE = re.compile(
    r"(?:.*;)?\s*(?:\$(?:httpMethod|httpHeaders|ct)|_method|x-(?:http-)?method(?:-override)?)"
    r"\s*(?:=.*)?", re.IGNORECASE | re.DOTALL)


def without(pattern, query):
    """Returns a query without the parameters that match."""
    return "&".join([part for part in query.split("&")
                     if not pattern.fullmatch(urllib.parse.unquote_plus(part))])


def fault_status(*values):
    """Returns the status of an error in a response: its own, else 429 or 400 for a kind of error
    that blames the account or the caller, and 502 for others."""
    words = " ".join([str(dig(value, key)) for value in values
                      for key in "code status status_code type".split()])
    told = re.search(r"(?<!\S)[45][0-9]{2}(?!\S)", words)
    if told:
        return int(told[0])
    return 429 if ACCOUNTS_FAULT.search(words) else 400 if CALLERS_FAULT.search(words) else 502


def fault_in(part, payload):
    """Returns the status of the error that a part of a payload is, 0 where it is none."""
    error = next(filter(None, map(part.get, ERROR_KEYS)), None)
    code = part.get("error_code") or dig(part, "base_resp", "status_code")  # Baidu, MiniMax
    if error or code or (part is payload and part.get("success") is False) or any(
            [FAULT.fullmatch(str(part.get(key))) for key in FAULT_KEYS]):
        return fault_status(*as_list(error)[:1], part, payload.get("error"))
    return 0


def is_name(value):
    """Returns whether a value can be the name of a model or a tier."""
    return isinstance(value, str) and 0 < len(value) <= 256 and value.isprintable()


def read_money(value):
    """Returns the amount of money that a value is, which some spell as text, else None."""
    if type(value) is str and AMOUNT.fullmatch(value):
        value = float(value)
    return value if type(value) in NUMBERS and 0 <= value < MAX_COST else None


def with_iterations(told, steps):
    """Returns the usage of a call that ran in several steps, some of them by another model. The
    reported sum may lack some of these (Anthropic's compaction)."""
    served = fold_model(told.model or "")
    own = [step for step in steps if not served or fold_model(step.model) == served]
    summed = Usage(others=tuple(own)).with_others()
    if summed.input + summed.output > told.input + told.output:
        told = summed._replace(**dict(zip(told._fields[7:], told[7:])))
    return told._replace(others=tuple([step for step in steps if step not in own]))


Block = Tuple[Any, ...]  # names a block of text: numbers, a type, and the keys and indexes to it
Way = List[Tuple[Any, Any]]  # to a value of JSON: what it stands in, and at which key or index


def tree_of(paths):
    """Returns paths of keys as dicts within dicts; "" is a key where one ends."""
    tree: JsonObject = {}
    for path in paths.split():
        level = tree
        for key in path.split("."):
            level = level.setdefault(key, {})
        level[""] = {}
    return tree


class Dialect:
    """Knows the wire names of one API. The base class is that of an upstream of an unknown API, and
    holds what most have in common."""
    name = ""
    # The metered endpoints, by the end of their paths; in any spelling they are reached by that.
    ENDPOINTS = {}
    # A header of its clients alone, and paths that no other API has, in lower case
    FIELD = ""
    PATH = re.compile("(?!)")
    STREAMS = ()  # ends of paths that ask for a stream where the payload does not say
    # What stands before the model in a path, the model, and what stands behind.
    MODEL_IN_PATH = re.compile(
        "(.*/models/(?=[^/]+:[^/:]+$)|/openai/deployments/)([A-Za-z0-9_.@-]{1,256})([/:].+)")
    # Asks Google's servers to leave out parts of a response, such as its usage.
    MASK_FIELD = "x-goog-fieldmask"
    # The keys of lists that name more models which may serve: to fall back to, or as tools; and
    # those of models in their rows.
    FALLBACKS = set_of("models fallbacks")
    MODEL_LISTS = FALLBACKS.union(("tools", "plugins"))
    ROW_KEYS = set_of("model analysis_models")
    MAX_MODELS = 16
    CREDENTIAL = "Authorization: Bearer %s"
    # Header lines that an upstream wants besides.
    VERSION_LINES = ()
    MODELS_PATH = "/v1/models"
    # Asks for a list of models that is whole.
    MODELS_QUERY = ""
    LISTED = ("data", "id")  # at which keys the rows are, and in each the name
    # Where clients ask for it, and whether a lone upstream's own is passed on, or made over.
    LIST_PATHS = ()
    OWN_LIST = False
    events = SSE
    # Whether the API's official clients skip comments in streams.
    TAKES_COMMENTS = True
    # Characters of a model's name in a limit reply, which repeats it in each event.
    REPLY_MODEL_LENGTH = 64
    # Where a text is spelled once more, token by token
    LOGPROBS = re.compile(rb'("logprobs(?:Result)?"\s*:\s*)([\[{])\s*(?:[^\]}\s]|\Z)')
    # Stands wherever usage is reported, and is searched for before any JSON is parsed.
    USAGE_MARK = b'"usage"'
    # Stands wherever searches of the web do that are told beside it.
    SEARCH_MARK = b'"web_search_call"'
    # Is named in the error of an upstream that does not take a request for usage.
    USAGE_OPTION = b""
    # Templates of errors, and their types by status; those of others are below 500, and above.
    ERROR = ""
    ERRORS = {}
    OTHER_ERRORS = ("", "")
    ERROR_LINE = b""  # before an error in a stream
    RETRY_DETAILS = ""  # in an error, where it is known when to ask again
    # ... of limit replies, by endpoint: whole, and in a stream one line for each event; and of what
    # stands in them more than once
    LIMIT_REPLIES = {}
    REPLY_PARTS = {}
    # ... and of lists of models.
    MODEL_LIST = ""
    MODEL = ""
    MODEL_KEYS = ("id",)  # at which its name stands
    # The parts of a response or an event in which usage may stand: they hold no caller's words. Of
    # lists no more is read than there may be choices.
    USAGE_HOLDERS = """response interaction message choices delta x_groq data result results stats
        meta_info meta tokens billed_units metrics details predictions embeddings statistics
        inlinedResponses per_model_usage amazon-bedrock-invocationMetrics
        Response Usage token_usage usage_metadata""".split()
    # Those of them that are answers to a prompt each, or sums of some
    ANSWERS = "results predictions inlinedResponses per_model_usage".split()
    # What a count is, in any of the APIs; the largest of those that are the same counts.
    COUNTS = {name: (kind, 1) for kind, *names in map(str.split, """\
        prompt prompt_tokens input_tokens inputTokens tokens_evaluated promptTokenCount
        prompt total_input_tokens prompt_eval_count promptTokens input_token_count input_length
        prompt prompt_token_count inputTokenCount inputTextTokenCount
        tools toolUsePromptTokenCount total_tool_use_tokens connector_tokens
        audio prompt_audio_seconds
        searches web_search_requests
        output completion_tokens output_tokens outputTokens tokens_predicted eval_count
        output total_output_tokens candidatesTokenCount completionTokens output_token_count
        output generated_token_count generated_tokens generation_token_count outputTokenCount
        output tokenCount candidates_token_count
        prompt PromptTokens
        output CompletionTokens
        total TotalTokens total_token_count
        total total_tokens totalTokens totalTokenCount token_count
        cached cached_tokens prompt_cache_hit_tokens cache_read_input_tokens num_cached_tokens
        cached cache_read_tokens cacheReadInputTokens cachedContentTokenCount total_cached_tokens
        written cache_write_tokens cache_creation_input_tokens cache_creation_tokens
        written cacheWriteInputTokens
        minutes ephemeral_5m_input_tokens
        hour ephemeral_1h_input_tokens
        reasoning reasoning_tokens thinking_tokens reasoning_output_tokens thoughtsTokenCount
        cached cached_content_token_count
        reasoning total_thought_tokens thoughts_token_count""".splitlines()) for name in names}
    # With these, be it in another event, input_tokens are without what caches had to do with, as
    # Anthropic means them.
    BESIDE_PROMPT = set_of("cache_read_input_tokens cache_creation_input_tokens cache_creation")
    OUTPUT = ("output",)  # what is added up to all of it
    # One of these must be reported.
    NEEDED_COUNTS = set_of("prompt output total")
    # What a call cost: at OpenRouter, Perplexity, DeepInfra, LLM Gateway; xAI's ticks
    COUNTS.update(dict.fromkeys("cost total_cost estimated_cost cost_usd_total".split(),
                                ("picodollars", PICODOLLARS)),
                  cost_in_usd_ticks=("picodollars", PICODOLLARS // 10 ** 10))
    # How it was served.
    TIERS = "service_tier speed inference_geo".split()
    TIER_MARK = b'"service_tier"'
    # The key of the model that served.
    SERVED = "model"
    # Where a response or an event says why the model stopped: the key of an object, or of a list of
    # them, and a key in these
    REASON = ("", "")
    # Other keys of that, by endpoint: the first one that is there counts.
    REASON_KEYS = {}
    # The key and the values by which events end a stream. Without these and a reason, nobody can
    # tell whether a stream is complete.
    LAST_KEY = "type"
    LAST_TYPES = ()
    # The value of the event that begins a stream, where that reports usage.
    FIRST_TYPE = ""
    # The states of background calls that have ended.
    LAST_STATES = "completed succeeded success failed cancelled canceled incomplete expired".split()
    # Where a payload may ask for words that a machine parses, and what asks for none of that.
    PARSED = {}
    # The keys of what the model says, in JSON and in streams ...
    TEXT_KEYS = ()
    # ... and by endpoint, where the events that end a stream repeat it.
    DELTA_KEYS = {}
    # Where events have text that goes on in the next one: paths of keys, through lists
    DELTAS = ""
    # Keys of the numbers of an event's block, where these are not the indexes on its path
    BLOCK_NUMBERS = ()
    # The types of events that end a block.
    BLOCK_END = re.compile("(?!)")

    def __init__(self):
        self.deltas = tree_of(self.DELTAS)
        self.usage_mark = self.USAGE_MARK.decode()
        self.usage_key = self.usage_mark[1:-1]
        self.tier_mark = self.TIER_MARK.decode()
        self.usage_begin = re.compile(self.USAGE_MARK + rb"\s*:\s*[{\d]")

    # -- requests

    def claims(self, path, fields):
        """Returns whether a request is one of this API, though nothing of it is metered; `path` is
        in lower case."""
        return self.FIELD in fields or bool(self.PATH.search(path))

    def requested(self, path, payload):
        """Returns the model that a call asks for, of any type, and whether it asks for a stream."""
        in_path = self.MODEL_IN_PATH.fullmatch(path)
        stream = payload.get("stream")
        return (in_path[2] if in_path else payload.get("model"),
                stream is True or stream is None and path.endswith(self.STREAMS))

    def with_model(self, path, payload, model):
        """Returns the path and the payload of a call of this model, wherever they name one."""
        in_path = self.MODEL_IN_PATH.fullmatch(path)
        if in_path:
            path = in_path[1] + urllib.parse.quote(model, safe="@:") + in_path[3]
        if model and payload.get("model", in_path and model) != model:
            payload = {**payload, "model": model}
        return path, payload

    def with_other_models(self, payload, rename):
        """Returns a payload in which the models that may serve besides the one that is asked for
        are renamed, and their names there; `rename` is None where none may. Raises BadRequest for
        too many."""
        if rename is None and not self.FALLBACKS.isdisjoint(payload):
            payload = {key: payload[key] for key in payload if key not in self.FALLBACKS}
        names = []
        lists = {key: self.renamed(payload[key], rename, names)
                 for key in sorted(self.MODEL_LISTS) if type(payload.get(key)) is list}
        changed = {**payload, **lists}
        return payload if changed == payload else changed, self.few(names)

    def few(self, names):
        """Returns each of these names once. Raises BadRequest for too many."""
        names = list(dict.fromkeys(names))
        if len(names) > self.MAX_MODELS or len("".join(names)) > 4096:
            raise BadRequest("The request names too many models")
        return names

    def renamed(self, one, rename, names):
        """Returns such a list, or a row of it, which is a name or an object with some."""
        if type(one) is list:
            return [self.renamed(row, rename, names) for row in one]
        if type(one) is str and rename:
            names.append(rename(one))
            return names[-1]
        if type(one) is not dict or self.ROW_KEYS.isdisjoint(one):
            return one
        return {key: self.renamed(value, rename, names) if key in self.ROW_KEYS else value
                for key, value in one.items() if rename or key not in self.ROW_KEYS}

    def request_usage(self, call: Call) -> None:
        """Makes the upstream's body ask for the usage of a stream, where that must be asked for."""

    # -- upstreams

    def model_name(self, model: str) -> str:
        """Returns the name by which limits, prices and routes know a model."""
        return model

    def place(self, path: str, dialect: "Dialect", metered: bool) -> Tuple[str, "Dialect"]:
        """Returns where a call of another dialect goes at an upstream of this one, and which API it
        finds there."""
        return path, dialect if metered or not self.name else self

    def listed_models(self, payload: Any) -> List["Model"]:
        """Reads an upstream's list of models; raises LookupError or TypeError."""
        rows, name = self.LISTED
        return [Model(str(row[name]), self, row) for row in payload[rows]]

    # -- responses: text in events

    def texts(self, payload: JsonObject) -> Iterator[Tuple[Block, Way]]:
        """Yields the texts of an event that go on in the next one: the block that each belongs to,
        and the way there."""
        kind = payload.get(self.LAST_KEY) if self.BLOCK_NUMBERS else None
        begin = self.block_numbers(payload), kind if type(kind) is str else ""
        values = [(self.deltas, begin, [], payload)]
        for tree, block, way, value in values:  # the list grows as it is walked
            if type(value) is dict:
                values += [(tree[key], (*block, key), [*way, (value, key)], value[key])
                           for key in tree if key in value]
            elif type(value) is list:
                values += [(tree, (*block, self.number(one, place)), [*way, (value, place)], one)
                           for place, one in enumerate(value)]
            elif type(value) is str and "" in tree:
                yield block, way

    def block_keys(self) -> Collection[str]:
        """Returns the keys of what says to which block a text belongs, and whether that ends."""
        return ("index", "type", "error", self.LAST_KEY, self.REASON[1], *self.BLOCK_NUMBERS)

    def block_numbers(self, payload):
        numbers = [payload.get(name) for name in self.BLOCK_NUMBERS]
        return tuple([number if type(number) is int else None for number in numbers])

    def number(self, one, place):
        """Returns the index of what stands at a place in a list."""
        index = one.get("index") if type(one) is dict else None
        return index if type(index) is int else place

    def is_json_text(self, block: Block) -> bool:
        """Returns whether the text of a block is JSON."""
        return block[-1] in JSON_TEXTS or block[1].endswith(JSON_TEXTS)

    def ends_block(self, payload: JsonObject, block: Block) -> bool:
        """Returns whether an event ends a block of text."""
        kind = payload.get(self.LAST_KEY)
        if kind in self.LAST_TYPES or payload.get("error") or payload.get("is_finished"):
            return True
        if type(kind) is str and self.BLOCK_END.search(kind):
            pairs = zip(self.block_numbers(payload), block[0])
            return all([number in (None, own) for number, own in pairs])
        holder, reason = self.REASON
        ones = payload.get(holder)
        if type(ones) is not list:
            return bool(dig(ones, reason))
        return any([block[2:4] == (holder, self.number(one, place)) and dig(one, reason)
                    for place, one in enumerate(ones)])

    # -- responses: the rest

    def is_stream(self, content_type: str) -> bool:
        """Returns whether a response of this type is cut into events."""
        return content_type.lower().startswith(self.events.content_type)

    def is_final(self, payload, counts):
        """Returns whether no more usage will be reported than the `counts` of a response or an
        event: None where that is known at the end."""
        if payload.get(self.LAST_KEY) == self.FIRST_TYPE:
            return False  # its output is no count yet
        ended = self.has_reason(payload) or self.is_last(payload)
        return ended or bool(  # some tell of the prompt first
            not payload.get(self.REASON[0]) and counts.get("output")) or None

    def usage_holders(self, payload):
        """Returns the objects in a response or an event in which usage and the like may stand, by
        the key at which they do."""
        return {name: [part for part in as_list(payload[name])[:1000] if type(part) is dict]
                for name in self.USAGE_HOLDERS if payload.get(name)}

    def counts_in(self, payload):
        """Returns what a response or an event reports of usage, by what it is."""
        counts = payload.get(self.usage_key)
        report = self.amounts_in(counts) if isinstance(counts, dict) else {}
        if not report:
            for name, holders in self.usage_holders(payload).items():
                join = operator.add if name in self.ANSWERS else max
                report = merged(report, reduce(
                    lambda one, part: merged(one, self.counts_in(part), join), holders, {}))
        beside = {name: payload[name] for name in payload if name in self.COUNTS}
        if beside:
            report = merged(self.amounts_in(beside), report)
        searches = self.searches(payload)
        return merged({"searches": searches}, report) if searches else report

    def amounts_in(self, counts):
        """Returns what counts and their details tell: tokens and searches by their kind, money in
        picodollars, tiers, the counts of iterations, and by which names. Null says nothing."""
        report = {name: counts[name] for name in self.TIERS if is_name(counts.get(name))}
        for one in [counts, *[one for one in counts.values() if type(one) is dict]]:
            for name in self.COUNTS.keys() & one:
                (kind, unit), value = self.COUNTS[name], one[name]
                amount = read_money(value) if kind == "picodollars" else is_count(value) and value
                if type(amount) in NUMBERS:
                    report[kind] = max(report.get(kind, 0), round(unit * amount))
        if counts.get("is_byok") is True and "picodollars" in report:  # OpenRouter, one's own key
            own = read_money(dig(counts, "cost_details", "upstream_inference_cost"))
            report["picodollars"] += round(PICODOLLARS * (own or 0))
        if isinstance(counts.get("iterations"), list):
            report["iterations"] = counts["iterations"]
        names = self.BESIDE_PROMPT | {"input_tokens"}
        report.update({name: True for name in names if counts.get(name)})
        return report

    def searches(self, payload):
        """Returns how often the web was searched, where a response does not count that itself."""
        return 0

    def served(self, payload: JsonObject) -> Tuple[Optional[str], Optional[str]]:
        """Returns the model that served, and the tier, as far as a response or an event says."""
        model = payload.get(self.SERVED)
        if payload.get("object") == "batch":
            return model if is_name(model) else None, "batch"
        if is_name(model):
            tier = payload.get(self.TIERS[0])
            return model, tier if is_name(tier) else None
        for holder in chain(*self.usage_holders(payload).values()):
            served = self.served(holder)
            if served[0]:
                return served
        return None, None

    def has_reason(self, payload):
        """Returns whether a response or an event says why the model has stopped."""
        holder, reason = self.REASON
        return any([dig(one, reason) for one in as_list(payload.get(holder))])

    def reasons(self, data: bytes, endpoint: str, streamed: bool) -> List[str]:
        """Returns why the model stopped, as JSON or the last events say: of each choice in JSON, in
        events, which may say it again, each reason once."""
        for key in self.REASON_KEYS.get(endpoint, self.REASON[1:]):
            reasons = re.findall(REASON_AT % key.encode(), data)
            if reasons:
                once = streamed or endpoint in self.REASON_KEYS
                return [reason.decode() for reason in (dict.fromkeys(reasons) if once else reasons)]
        return []

    def is_last(self, payload):
        """Returns whether an event ends its stream."""
        return payload.get(self.LAST_KEY) in self.LAST_TYPES

    def fault(self, payload: JsonObject) -> int:
        """Returns the status of the error that a response or an event with status 200 is, 0 where
        it is none: one of several answers may have gone well."""
        for holders in (*self.usage_holders(payload).values(), [payload]):
            faults = [fault_in(holder, payload) for holder in holders]
            if faults and all(faults):
                return faults[0]
        return 0

    def usual_usage(self, text, model, begin):
        """Returns the usage of a response that is no error, where it can be told without parsing it
        that `model` served, and that nothing else is of interest. `begin` is where to look from: 0,
        or where a stream's last event begins."""
        return None

    def find_usage(self, data, openings):
        """Returns a JSON object from its usage on: most of it is never parsed, and its beginning
        may be missing. The usage must be the response's own, as callers can plant others in what
        is echoed: then one of `openings` and the rest of the JSON are one whole object."""
        start = len(data)
        served = b'"%b"' % self.SERVED.encode()
        for _ in range(5):  # so many may be planted; to try more would take long
            start = data.rfind(self.USAGE_MARK, 0, start)
            if start < 0:
                break
            before = data.rfind(served, max(0, start - 300), start)  # embeddings end with both
            for begin, opening in itertools.product({before, start} - {-1}, openings):
                payload = object_in(opening + data[begin:])
                if payload:
                    return payload
        return {}

    def usage(self, report: JsonObject, model: Optional[str] = None,
              tier: Optional[str] = None) -> Optional[Usage]:
        """Returns None where a report says nothing that is plausible."""
        told = self.usage_of_step(report, model, tier)
        if told is None or "iterations" not in report:
            return told
        steps = [self.usage_of_step(self.amounts_in(one), self.served(one)[0] or model, tier)
                 for one in report["iterations"] if isinstance(one, dict)]
        return with_iterations(told, [step for step in steps if step])

    def usage_of_step(self, report, model, tier):
        """Returns the usage that a report tells, but for iterations. An input of nothing is none
        that was told: some leave out what was in a cache."""
        if self.NEEDED_COUNTS.isdisjoint(report):
            return None
        by_kind = defaultdict(int, report)
        by_kind["written"] = max(by_kind["written"], by_kind["minutes"] + by_kind["hour"])
        prompt, output = self.sides(by_kind)
        cached = min(prompt, by_kind["cached"])
        written = min(prompt - cached, by_kind["written"])
        tiers = dict.fromkeys(filter(None, [tier, *map(report.get, self.TIERS)]))
        is_told = prompt and not {"prompt", "total"}.isdisjoint(report)
        return Usage(prompt, output, cached, written, min(output, by_kind["reasoning"]),
                     not is_told, min(written, by_kind["hour"]), model, tuple(tiers),
                     report.get("picodollars"), (), by_kind["searches"])

    def sides(self, by_kind):
        """Returns all of the input, and of the output. Whether caches and reasoning are parts of
        the prompt and of the output or stand beside them is what a total tells; without one it is
        as usual in this API, but for parts that are larger than the whole."""
        prompt, output, total = by_kind["prompt"], by_kind["output"], by_kind["total"]
        caches, reasoning = by_kind["cached"] + by_kind["written"], by_kind["reasoning"]
        beside = "input_tokens" in by_kind and not self.BESIDE_PROMPT.isdisjoint(by_kind)
        sent = prompt + (caches if beside else by_kind["tools"])
        said = sum(map(by_kind.__getitem__, self.OUTPUT))
        pairs = itertools.product(
            (sent, prompt, prompt + caches, prompt + by_kind["cached"],
             prompt + by_kind["written"]),
            (said, output, output + reasoning))
        for pair in pairs:  # the first as nearly always
            if sum(pair) == total and pair[0] >= caches and pair[1] >= reasoning:
                return pair
        sent = max(sent, prompt + caches if caches > prompt else 0)
        said = max(said, output + reasoning if reasoning > output else 0)
        if by_kind["audio"] or not sent:  # Mistral counts sounds in the total alone
            sent = max(sent, total - said)
        return sent, max(said, total - sent)  # some count reasoning in the total alone

    def said(self, data: bytes, endpoint: str, streamed: bool) -> List[str]:
        """Returns what the model said in JSON or in events, which may be cut off. One search finds
        all: to parse each event of a stream takes ten times as long."""
        keys = streamed and self.DELTA_KEYS.get(endpoint) or self.TEXT_KEYS
        text = data.decode("utf-8", "replace")
        # What several keys say in the same words is said once: some mirror reasoning.
        said = {"".join(re.findall(TEXT_AT % key, text)) for key in keys if f'"{key}"' in text}
        return list(map(read_string, said))

    def error(self, refusal: Refusal, status: int) -> bytes:
        """Returns the body of an error."""
        kind = self.ERRORS.get(str(status), self.OTHER_ERRORS[status >= 500])
        seconds = refusal.fields.get("Retry-After")
        details = self.RETRY_DETAILS % {"seconds": seconds} if seconds else ""
        return (self.ERROR % {
            "message": json.dumps(str(refusal)), "kind": kind, "status": status,
            "code": json.dumps(refusal.code), "details": details}).encode()

    def final_error(self, refusal: Refusal, status: int, resets_at: Optional[int]) -> bytes:
        """Returns the body of an error after which a client that would wait for hours gives up;
        `resets_at` is in unix seconds, None where no wait will do."""
        return self.error(refusal, status)

    def error_event(self, body: bytes, endpoint: str) -> bytes:
        """Returns an error in a stream that has begun; `body` is what it would be without one."""
        return self.events.event(body, self.ERROR_LINE)

    def models(self, models: List["Model"]) -> bytes:
        """Returns the list of these. A row has all that its upstream tells in this API, too."""
        quoted = [json.dumps(one.name) for one in models]
        rows = []
        for name, one in zip(quoted, models):
            row = json.loads(self.MODEL % {"name": name[1:-1]})
            facts = one.facts if one.dialect is self else {}
            rows.append(json.dumps({**row, **facts, **{key: row[key] for key in self.MODEL_KEYS}}))
        ends = quoted or ["null"]
        return (self.MODEL_LIST % {
            "rows": ", ".join(rows), "first": ends[0], "last": ends[-1]}).encode()

    def limit_reply(self, call: Call, text: str, created: int) -> Optional[bytes]:
        """Returns a whole answer in which the assistant says `text`, a stream where one was asked
        for; None where no assistant can speak. `created` is in unix seconds."""
        if call.endpoint in NO_LIMIT_REPLY or self.is_parsed(call.payload):
            return None
        model = call.model or call.upstream_model
        reply = self.limit_text(call, {
            "text": json.dumps(text),
            "model": json.dumps(model[:self.REPLY_MODEL_LENGTH]),
            "created": str(created),
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(created)),
            "number": "%024x" % random.getrandbits(96)})
        if reply and self.is_stream(self.limit_type(call)):
            return b"".join(map(self.limit_event, reply.encode().split(b"\n")))
        return reply and reply.encode()

    def is_parsed(self, payload):
        """Returns whether a machine will parse what the model says, so that no sentence fits, or an
        editor will put it into a file."""
        if FILL_IN.search(str(payload.get("prompt"))):
            return True
        for path, free in self.PARSED.items():
            value = dig(payload, *path.split("."))
            if isinstance(value, dict):
                value = value.get("type", value)
            if value is not None and value not in free:
                return True
        return False

    def limit_text(self, call, values):
        """Returns a limit reply as JSON, in a stream one line for each event, or None; `values` are
        what its templates are filled with, as JSON."""
        for name, template in self.REPLY_PARTS.items():
            values[name] = template % values
        templates = self.LIMIT_REPLIES.get(call.endpoint)
        return templates and templates[call.stream] % values

    def limit_event(self, line):
        """Returns an event of a limit reply; one that says its type first is named by it."""
        named = re.match(rb'{"(?:event_)?type": "([^"]*)', line)
        return self.events.event(line, b"event: %b\n" % named[1] if named else b"")

    def limit_type(self, call: Call) -> str:
        """Returns the content type of a limit reply."""
        return self.events.content_type if call.stream else "application/json"


# A word at a key, but for those that say that the model has not stopped
REASON_AT = rb'"%b"\s*:\s*"(?!in_progress|queued)([A-Za-z_-]{1,40})"'
# A string of JSON at a key, up to where it may be cut
TEXT_AT = r'"%s"\s*:\s*"([^"\\]*(?:\\(?:u[0-9A-Fa-f]{4}|[^u])[^"\\]*)*)'
# Limit replies of OpenAI that have choices, with one each
COMPLETIONS = {
    "chat": ("""{"id": "chatcmpl-%(id)s", "object": "chat.completion", %(one)s, \
"message": {"role": "assistant", "content": %(text)s}, "finish_reason": "stop"}], %(usage)s}""",
             """\
{"id": "chatcmpl-%(id)s", "object": "chat.completion.chunk", %(one)s, \
"delta": {"role": "assistant", "content": ""}, "finish_reason": null}]}
{"id": "chatcmpl-%(id)s", "object": "chat.completion.chunk", %(one)s, \
"delta": {"content": %(text)s}, "finish_reason": null}]}
{"id": "chatcmpl-%(id)s", "object": "chat.completion.chunk", %(one)s, \
"delta": {}, "finish_reason": "stop"}]}"""),
    "completions": ("""{"id": "cmpl-%(id)s", "object": "text_completion", %(one)s, \
"text": %(text)s, "finish_reason": "stop"}], %(usage)s}""", """\
{"id": "cmpl-%(id)s", "object": "text_completion", %(one)s, \
"text": %(text)s, "finish_reason": null}]}
{"id": "cmpl-%(id)s", "object": "text_completion", %(one)s, \
"text": "", "finish_reason": "stop"}]}""")}
ZERO_USAGE = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
RESPONSE = """"id": "resp_limit_%(number)s", "object": "response", "created_at": %(created)s, \
"model": %(model)s, "incomplete_details": null, "instructions": null, "metadata": {}, \
"parallel_tool_calls": true, "temperature": null, "tool_choice": "auto", "tools": [], \
"top_p": null, "previous_response_id": null"""
OPENAI_PARTS = {
    "id": "limit-%(number)s",
    "one": """"created": %(created)s, "model": %(model)s, "choices": [{"logprobs": null""",
    "usage": '"usage": ' + json.dumps(ZERO_USAGE),
    "part": """{"type": "output_text", "text": %(text)s, "annotations": [], "logprobs": []}""",
    "item": """{"type": "message", "id": "msg_limit_%(number)s", "role": "assistant", \
"status": "completed", "content": [%(part)s]}""",
    "place": """"output_index": 0, "item_id": "msg_limit_%(number)s", "content_index": 0""",
    "response": RESPONSE,
    "begun": """{%(response)s, "status": "in_progress", "output": [], "error": null, \
"usage": null}""",
    "completed": """{%(response)s, "status": "completed", "output": [%(item)s], "error": null, \
"usage": {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0, \
"input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0}, \
"output_tokens_details": {"reasoning_tokens": 0}}}"""}
RESPONSE_FAILED = """{"type": "response.failed", "sequence_number": 0, "response": {%s, \
"status": "failed", "output": [], "usage": null, \
"error": {"code": "server_error", "message": %%(message)s}}}""" % RESPONSE
RESPONSE_EVENTS = """\
{"type": "response.created", "sequence_number": 0, "response": %(begun)s}
{"type": "response.in_progress", "sequence_number": 1, "response": %(begun)s}
{"type": "response.output_item.added", "sequence_number": 2, "output_index": 0, \
"item": {"type": "message", "id": "msg_limit_%(number)s", "role": "assistant", \
"status": "in_progress", "content": []}}
{"type": "response.content_part.added", "sequence_number": 3, %(place)s, \
"part": {"type": "output_text", "text": "", "annotations": [], "logprobs": []}}
{"type": "response.output_text.delta", "sequence_number": 4, %(place)s, \
"delta": %(text)s, "logprobs": []}
{"type": "response.output_text.done", "sequence_number": 5, %(place)s, \
"text": %(text)s, "logprobs": []}
{"type": "response.content_part.done", "sequence_number": 6, %(place)s, "part": %(part)s}
{"type": "response.output_item.done", "sequence_number": 7, "output_index": 0, "item": %(item)s}
{"type": "response.completed", "sequence_number": 8, "response": %(completed)s}"""
# What leaves the model free to say what it likes, at the keys of PARSED
FREE_CHOICE = ("", {}, "auto", "none", "allowed_tools")
FREE_FORMAT = ("", {}, "text")
NOTHING = ("", {}, [], False)
# Marks of what stands around a gap, as models are trained to fill it
FILL_IN = re.compile(r"<.?fim[^a-z]|<PRE>|\[SUFFIX\]|<\|(?:editable_region|user_cursor|cursor)")


USUAL_COUNTS = "prompt_tokens", "completion_tokens", "total_tokens"
MAX_USUAL = 200  # characters of usage that tells no more


@lru_cache(KNOWN_MODELS)
def model_marks(model):
    """Returns how most servers spell in JSON which model served."""
    name = model.encode("utf-8", "replace").decode("latin-1")
    return f'"model":"{name}"', f'"model": "{name}"'


class OpenAI(Dialect):
    """The OpenAI API and all that resembles it (https://platform.openai.com/docs/api-reference)."""
    name = "openai"
    # Some are Perplexity's, vLLM's, Mistral's and Inception's. What counts tokens, spells them out
    # or describes a model costs nothing.
    ENDPOINTS = table_of("""
        /async/chat/completions unknown
        /chat/completions chat
        /chat/completions/batch batch
        /fim/completions fim
        /agents/completions chat
        /edit/completions fim
        /apply/completions fim
        /completions completions
        /responses responses
        /responses/compact other
        /embeddings other
        /rerank other
        /generations other
        /input_tokens count
        /tokenize count
        /detokenize count
        /apply-template count""")
    # Azure's: https://learn.microsoft.com/azure/ai-services/openai/reference
    MODEL_IN_PATH = re.compile("(/openai/deployments/)([^/]+)(/.+)", re.IGNORECASE)
    LIST_PATHS = ("/v1/models", "/models")
    OWN_LIST = True
    USAGE_OPTION = b"stream_options"
    # Stands in events that do more than report usage, and what else does in those that do not.
    CONTENT = re.compile(rb'"choices"\s*:\s*\[\s*\{')
    ENVELOPE = set_of("""
        id object created model service_tier system_fingerprint provider obfuscation p x_groq""")
    REASON = ("choices", "finish_reason")
    REASON_KEYS = {"responses": ("reason", "status")}
    LAST_TYPES = """
        response.completed response.incomplete response.failed response.cancelled""".split()
    PARSED = {
        "tool_choice": FREE_CHOICE, "tool_choice.mode": FREE_CHOICE,
        "tool_choice.allowed_tools.mode": FREE_CHOICE, "function_call": FREE_CHOICE,
        "response_format": FREE_FORMAT, "text.format": FREE_FORMAT,
        "suffix": (),  # the text to fill in goes into a file
        **dict.fromkeys("""grammar json_schema structured_outputs guided_json guided_regex
            guided_choice guided_grammar guided_decoding nvext prediction regex ebnf
            regex_pattern grammar_string""".split(), NOTHING)}  # vLLM, SGLang, llama.cpp, TabbyAPI
    MAX_CHOICES = 4  # in a limit reply
    LIMIT_REPLIES = {**COMPLETIONS, "responses": ("%(completed)s", RESPONSE_EVENTS)}
    REPLY_PARTS = OPENAI_PARTS
    TEXT_KEYS = """content reasoning_content reasoning refusal arguments text response
        generated_text completion generation outputText""".split()  # TGI's, and some at AWS
    DELTA_KEYS = {"responses": ("delta",)}
    DELTAS = """
        choices.text choices.delta.content choices.delta.content.text
        choices.delta.content.thinking.text choices.delta.reasoning_content
        choices.delta.reasoning choices.delta.reasoning_details.text
        choices.delta.reasoning_details.summary choices.delta.audio.transcript choices.delta.refusal
        choices.delta.tool_calls.function.arguments choices.delta.function_call.arguments delta
        choices.delta.tool_calls.custom.input delta.content.text.value
        content text token.text delta.message.content.text delta.message.content.thinking
        delta.message.tool_calls.function.arguments delta.message.tool_plan
        tool_call_delta.parameters"""  # llama.cpp's, TGI's and Cohere's own
    BLOCK_NUMBERS = "output_index content_index summary_index".split()
    BLOCK_END = re.compile(r"\.done$|-end$")  # the latter are Cohere's

    ERRORS = table_of("""
        401 authentication_error
        408 timeout_error
        429 rate_limit_error
        500 server_error
        502 upstream_error
        503 server_error
        504 timeout_error""")
    OTHER_ERRORS = ("invalid_request_error", "invalid_request_error")
    ERROR = """{"error": {"message": %(message)s, "type": "%(kind)s", "param": null, \
"code": %(code)s}}"""
    MODEL_LIST = '{"object": "list", "data": [%(rows)s]}'
    MODEL = '{"id": "%(name)s", "object": "model", "created": 0, "owned_by": "llm-proxy"}'

    def request_usage(self, call):
        if not call.stream or call.endpoint not in ("chat", "completions"):
            return
        options = call.payload.get("stream_options")
        if not isinstance(options, dict):
            options = {}
        # OpenRouter has a question of its own.
        asked = options.get("include_usage") or dig(call.payload, "usage", "include")
        call.usage_requested_by_us = not asked
        if options.get("include_usage") is True:
            return
        if "stream_options" in call.payload:
            call.upstream_body = JsonBody(call.upstream_body).with_value(
                "stream_options", {**options, "include_usage": True})
        else:  # spliced in: nothing of what the caller wrote changes
            rest = call.upstream_body.lstrip()[1:]
            call.upstream_body = b'{"stream_options":{"include_usage":true},' + rest

    def without_usage(self, payload):
        """Returns what an event says besides usage, {} where that is nothing. It has a choice: many
        clients look at the first one of each event."""
        rest = {name: value for name, value in payload.items() if name != self.usage_key}
        if not any([rest[name] for name in rest.keys() - self.ENVELOPE]):
            return {}
        if rest.get("choices") == [] and rest != payload:
            rest["choices"] = [{"index": 0, "delta": {}, "text": "", "finish_reason": None}]
        return rest

    def usual_usage(self, text, model, begin):
        """Finds three counts, as most servers tell no more, in what ends the response."""
        event = text[begin:]
        mark, spaced = model_marks(model)
        start = text.find(self.usage_mark) - begin  # nothing is told before
        if (start < max(0, len(event) - MAX_USUAL) or event.count("_tokens") != 3
                or event.count('"model"') != 1 or not (mark in event or spaced in event)
                or self.tier_mark in text or '"status"' in event):
            return None
        try:
            brace = event.index("{", start)
            counts, end = PLAIN_JSON.scan_once(event, brace)
        except (ValueError, StopIteration):
            return None
        prompt, output, total = map(counts.get, USUAL_COUNTS)
        if len(counts) > 3 or event[start:brace].rstrip() != '"usage":' or (
                event[end:].strip() != "}"):
            return None
        if not (type(prompt) is type(output) is type(total) is int
                and 0 < prompt <= total == prompt + output < MAX_TOKENS_PER_CALL):
            return None
        return new_tuple(Usage, (prompt, output, 0, 0, 0, False, 0, model, (), None, (), 0))

    def searches(self, payload):
        """Counts the searches in the output; opening a page is none."""
        return sum([dig(one, "type") == "web_search_call"
                    and dig(one, "action", "type") in (None, "search")
                    for one in as_list(payload.get("output"))])

    def final_error(self, refusal, status, resets_at):
        """Returns what Codex takes for the end of a plan, and tells its user (openai/codex,
        codex-api/src/api_bridge.rs)."""
        error = json.loads(self.error(refusal, status))["error"]
        return to_json_bytes({
            "error": {**error, "type": "usage_limit_reached", "resets_at": resets_at}})

    def error_event(self, body, endpoint):
        if endpoint != "responses":
            return super().error_event(body, endpoint)
        message = dig(object_in(body), "error", "message")  # Codex shows no other event
        return self.limit_event((RESPONSE_FAILED % {
            "number": "failed", "created": "0", "model": '""',
            "message": json.dumps(str(message))}).encode())

    def limit_text(self, call, values):
        """Returns a limit reply with as many choices as were asked for, as clients rely on that."""
        text = super().limit_text(call, values)
        if call.endpoint not in COMPLETIONS:
            return text
        count = 1
        with suppress(BadRequest):
            count = min(self.MAX_CHOICES, call.output_limit()[1])
        asked = dig(call.payload, "stream_options", "include_usage") is True
        chunks = []
        for chunk in map(json.loads, text.split("\n")):
            choices = [{"index": index, **chunk["choices"][0]} for index in range(count)]
            if not call.stream:
                return json.dumps({**chunk, "choices": choices})
            if asked:
                chunk["usage"] = None
            chunks += [{**chunk, "choices": [choice]} for choice in choices]
        if asked:
            chunks.append({**chunk, "choices": [], "usage": ZERO_USAGE})
        return "\n".join([*map(json.dumps, chunks), "[DONE]"])


class Azure(OpenAI):
    """The OpenAI API of Azure (https://learn.microsoft.com/azure/ai-services/openai/reference). Its
    calls are OpenAI's, below /openai/v1, or below /openai with the model in the path."""
    name = "azure"
    ENDPOINTS = {}
    CREDENTIAL = "api-key: %s"

    def place(self, path, dialect, metered):
        if not isinstance(dialect, OpenAI):
            return super().place(path, dialect, metered)
        if not path.startswith("/openai/"):
            path = "/openai/v1" + path.removeprefix("/v1")
        return path, self


MESSAGE = """{"id": "msg_limit_%(number)s", "type": "message", "role": "assistant", \
"model": %(model)s, "content": [{"type": "text", "text": %(text)s}], "stop_reason": "end_turn", \
"stop_sequence": null, "usage": {"input_tokens": 0, "output_tokens": 0}}"""
MESSAGE_EVENTS = """\
{"type": "message_start", "message": {"id": "msg_limit_%(number)s", "type": "message", \
"role": "assistant", "model": %(model)s, "content": [], "stop_reason": null, \
"stop_sequence": null, "usage": {"input_tokens": 0, "output_tokens": 0}}}
{"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
{"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": %(text)s}}
{"type": "content_block_stop", "index": 0}
{"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": null}, \
"usage": {"output_tokens": 0}}
{"type": "message_stop"}"""


class Anthropic(Dialect):
    """The Anthropic messages API (https://docs.anthropic.com/en/api/messages)."""
    name = "anthropic"
    ENDPOINTS = table_of("""
        /messages messages
        /count_tokens count""")
    FIELD = "anthropic-version"
    PATH = re.compile("(?:^|/v1)/messages(?:/|$)")  # others have messages, too
    CREDENTIAL = "x-api-key: %s"
    VERSION_LINES = ("anthropic-version: 2023-06-01",)
    MODELS_QUERY = "limit=1000"
    REASON = ("delta", "stop_reason")
    FIRST_TYPE = "message_start"
    LAST_TYPES = ("message_stop",)
    PARSED = {"tool_choice": FREE_CHOICE, "output_format": FREE_FORMAT,
              "output_config.format": FREE_FORMAT}
    TEXT_KEYS = "text thinking partial_json".split()
    DELTAS = "delta.text delta.thinking delta.partial_json delta.content"
    BLOCK_NUMBERS = ("index",)
    BLOCK_END = re.compile("_stop$")
    ERROR = '{"type": "error", "error": {"type": "%(kind)s", "message": %(message)s}}'
    ERRORS = table_of("""
        401 authentication_error
        403 permission_error
        404 not_found_error
        413 request_too_large
        429 rate_limit_error
        503 overloaded_error""")
    OTHER_ERRORS = ("invalid_request_error", "api_error")
    ERROR_LINE = b"event: error\n"
    LIMIT_REPLIES = {"messages": (MESSAGE, MESSAGE_EVENTS)}
    MODEL_LIST = """{"data": [%(rows)s], "has_more": false, "first_id": %(first)s, \
"last_id": %(last)s}"""
    MODEL = """{"type": "model", "id": "%(name)s", "display_name": "%(name)s", \
"created_at": "1970-01-01T00:00:00Z"}"""


GENERATED = """{"candidates": [{"content": {"parts": [{"text": %(text)s}], "role": "model"}, \
"finishReason": "STOP", "index": 0}], "usageMetadata": {"promptTokenCount": 0, \
"candidatesTokenCount": 0, "totalTokenCount": 0}, "modelVersion": %(model)s, \
"responseId": "limit-%(number)s"}"""
# Google takes each key in two spellings, and mixed.
GEMINI_FORMATS = """
    generationConfig.responseMimeType generation_config.responseMimeType
    generationConfig.response_mime_type generation_config.response_mime_type
    generationConfig.responseSchema generation_config.responseSchema
    generationConfig.response_schema generation_config.response_schema
    generationConfig.responseJsonSchema generation_config.responseJsonSchema
    generationConfig.response_json_schema generation_config.response_json_schema"""
GEMINI_CHOICES = """
    toolConfig.functionCallingConfig.mode tool_config.functionCallingConfig.mode
    toolConfig.function_calling_config.mode tool_config.function_calling_config.mode"""
# The place of OpenAI's API at Gemini: https://ai.google.dev/gemini-api/docs/openai
OPENAI_AT_GEMINI = "/v1beta/openai/"


class Google(Dialect):
    """What the two APIs of Gemini have in common."""
    CREDENTIAL = "x-goog-api-key: %s"
    TAKES_COMMENTS = False  # google-genai takes them for data, and fails
    TIERS = "service_tier serviceTier trafficType".split()
    NEEDED_COUNTS = set_of("prompt total")
    OUTPUT = ("output", "reasoning")
    ERROR = """{"error": {"code": %(status)d, "message": %(message)s, \
"status": "%(kind)s"%(details)s}}"""
    # Gemini CLI gives up where this is long (googleQuotaErrors.ts), else asks ten times.
    RETRY_DETAILS = """, "details": [{"@type": "type.googleapis.com/google.rpc.RetryInfo", \
"retryDelay": "%(seconds)ss"}]"""
    ERRORS = table_of("""
        400 INVALID_ARGUMENT
        401 UNAUTHENTICATED
        403 PERMISSION_DENIED
        404 NOT_FOUND
        429 RESOURCE_EXHAUSTED
        500 INTERNAL
        504 DEADLINE_EXCEEDED""")
    OTHER_ERRORS = ("INVALID_ARGUMENT", "UNAVAILABLE")

    def model_name(self, model):
        """Returns the name without models/, which Gemini takes as well."""
        return model.removeprefix("models/")


class Gemini(Google):
    """The Gemini API (https://ai.google.dev/api/generate-content). The model stands in the path,
    and so does whether to stream; a stream without ?alt=sse is a JSON array."""
    name = "gemini"
    ENDPOINTS = table_of("""
        :generateContent generate
        :streamGenerateContent generate
        :embedContent embed
        :batchEmbedContents embed
        :countTokens count""")
    PATH = re.compile("^/v1beta/(?!openai/)|(?:%s)$" % "|".join(ENDPOINTS), re.IGNORECASE)
    STREAMS = ":streamGenerateContent"
    MODEL_IN_PATH = re.compile("(.*/)([^/]*)(:[^/:]*)")
    LIST_PATHS = ("/v1beta/models",)
    USAGE_MARK = b'"usageMetadata"'
    SEARCH_MARK = b'"webSearchQueries"'
    ANSWERS = ("predictions", "inlinedResponses")  # a stream without events is an array
    SERVED = "modelVersion"
    REASON = ("candidates", "finishReason")
    PARSED = {
        **dict.fromkeys(GEMINI_FORMATS.split(), ("", {}, "text/plain")),
        **dict.fromkeys(GEMINI_CHOICES.split(), (
            "", "MODE_UNSPECIFIED", "AUTO", "NONE", "VALIDATED"))}
    TEXT_KEYS = ("text",)
    DELTAS = """candidates.content.parts.text
        candidates.content.parts.functionCall.partialArgs.stringValue"""
    LIMIT_REPLIES = {"generate": (GENERATED, GENERATED)}
    MODEL_LIST = '{"models": [%(rows)s]}'
    MODEL = '{"name": "models/%(name)s", "displayName": "%(name)s"}'
    MODEL_KEYS = ("name",)

    def claims(self, path, fields):
        key_alone = "x-goog-api-key" in fields and "authorization" not in fields
        return key_alone or super().claims(path, fields)

    def requested(self, path, payload):
        return super().requested(path, {})

    def with_model(self, path, payload, model):
        """Returns the path and the payload of a call of this model; in the payload the model is
        only an echo, under another name."""
        return super().with_model(path, {}, model)[0], payload

    def place(self, path, dialect, metered):
        if dialect.name == "openai":
            path = re.sub("^/v1/", OPENAI_AT_GEMINI, path)
        if path.startswith(OPENAI_AT_GEMINI):
            return path, DIALECTS["openai"]
        return super().place(path, dialect, metered)

    def searches(self, payload):
        lists = [dig(one, "groundingMetadata", "webSearchQueries")
                 for one in as_list(payload.get("candidates"))]
        return sum([len(queries) for queries in lists if type(queries) is list])

    def is_last(self, payload):
        return bool(dig(payload, "promptFeedback", "blockReason")) or self.has_reason(payload)

    def number(self, one, place):
        """Numbers a part: the parts of one event continue those of the event before, thoughts and
        text apart."""
        if type(one) is dict and "text" in one:
            return "thought" if one.get("thought") is True else "said"
        path = dig(one, "jsonPath")  # of an argument of a tool
        return path if type(path) is str else super().number(one, 0)

    def limit_text(self, call, values):
        """Returns a limit reply; a stream without events is an array."""
        text = super().limit_text(call, values)
        is_array = text and call.stream and not self.is_stream(self.limit_type(call))
        return f"[{text}]" if is_array else text

    def limit_type(self, call):
        events = "alt=sse" in call.query.lower().split("&")
        return super().limit_type(call) if events else "application/json"


INTERACTION_PARTS = {
    "begun": """"id": "limit-%(number)s", "object": "interaction", "model": %(model)s, \
"created": "%(date)s\"""",
    "completed": """{%(begun)s, "status": "completed", "role": "model", "updated": "%(date)s", \
"usage": {"total_input_tokens": 0, "total_output_tokens": 0, "total_thought_tokens": 0, \
"total_cached_tokens": 0, "total_tool_use_tokens": 0, "total_tokens": 0}, "steps\""""}
INTERACTION = """%(completed)s: [{"type": "model_output", \
"content": [{"type": "text", "text": %(text)s}]}]}"""
INTERACTION_EVENTS = """\
{"event_type": "interaction.created", "interaction": {%(begun)s, "status": "in_progress"}}
{"event_type": "step.start", "index": 0, "step": {"type": "model_output"}}
{"event_type": "step.delta", "index": 0, "delta": {"type": "text", "text": %(text)s}}
{"event_type": "step.stop", "index": 0}
{"event_type": "interaction.completed", "interaction": %(completed)s: []}}
[DONE]"""


class Interactions(Google):
    """The newer API of Gemini (https://ai.google.dev/gemini-api/docs/interactions). What of it is
    not metered is taken for the other's."""
    name = "interactions"
    ENDPOINTS = {"/interactions": "interactions"}
    PARSED = {
        "response_format": ("", {}, []), "response_mime_type": ("", "text/plain"),
        "generation_config.tool_choice": ("", {}, "auto", "none", "validated"),
        "background": (False,)}
    REASON_KEYS = {"interactions": ("status",)}
    LAST_KEY = "event_type"
    LAST_TYPES = ("interaction.completed", "interaction.complete")
    TEXT_KEYS = ("text", "arguments")
    DELTAS = "delta.text delta.arguments delta.content.text"
    BLOCK_NUMBERS = ("index",)
    BLOCK_END = re.compile(r"\.stop$")
    LIMIT_REPLIES = {"interactions": (INTERACTION, INTERACTION_EVENTS)}
    REPLY_PARTS = INTERACTION_PARTS

    def searches(self, payload):
        tools = as_list(dig(payload, "usage", "grounding_tool_count"))
        return sum([one["count"] for one in tools if dig(one, "type") == "google_search"
                    and is_count(one.get("count"))])

    def is_final(self, payload, counts):
        """Returns True for the last event, which has the counts of the whole interaction."""
        return payload.get(self.LAST_KEY) in (None, *self.LAST_TYPES)


OLLAMA_PARTS = {
    "head": """{"model": %(model)s, "created_at": "%(date)s\"""",
    "last": """"done": true, "done_reason": "stop", "total_duration": 0, "load_duration": 0, \
"prompt_eval_count": 0, "prompt_eval_duration": 0, "eval_count": 0, "eval_duration": 0}"""}
OLLAMA_REPLIES = {
    "chat": ("""%(head)s, "message": {"role": "assistant", "content": %(text)s}, %(last)s""", """\
%(head)s, "message": {"role": "assistant", "content": %(text)s}, "done": false}
%(head)s, "message": {"role": "assistant", "content": ""}, %(last)s"""),
    "generate": ("""%(head)s, "response": %(text)s, %(last)s""", """\
%(head)s, "response": %(text)s, "done": false}
%(head)s, "response": "", %(last)s""")}


class Ollama(Dialect):
    """Ollama's own API (https://github.com/ollama/ollama/blob/main/docs/api.md), which streams
    lines of JSON unless it is told not to. OpenAI's and Anthropic's are below /v1."""
    name = "ollama"
    ENDPOINTS = table_of("""
        /api/chat chat
        /api/generate generate
        /api/embed embed
        /api/embeddings embed
        /api/show count""")
    PATH = re.compile("^/api/(?!v[0-9])")  # others have versions there
    STREAMS = ("/chat", "/generate")
    MODELS_PATH = "/api/tags"
    LISTED = ("models", "name")
    LIST_PATHS = (MODELS_PATH,)
    OWN_LIST = True
    events = NDJSON
    TAKES_COMMENTS = False
    USAGE_MARK = b'"total_duration"'  # the first of its numbers
    PARSED = {"format": FREE_FORMAT, "suffix": ("",), "raw": (False,)}
    REASON = ("", "done_reason")
    LAST_KEY = "done"
    LAST_TYPES = (True,)
    TEXT_KEYS = "content response thinking".split()
    DELTAS = "message.content message.thinking response thinking"
    ERROR = '{"error": %(message)s}'
    LIMIT_REPLIES = OLLAMA_REPLIES
    REPLY_PARTS = OLLAMA_PARTS
    MODEL_LIST = '{"models": [%(rows)s]}'
    MODEL_KEYS = ("name", "model")
    MODEL = """{"name": "%(name)s", "model": "%(name)s", \
"modified_at": "1970-01-01T00:00:00Z", "size": 0, "digest": "", "details": {}}"""

    def place(self, path, dialect, metered):
        if not path.startswith(("/api/", "/v1/")) and path != "/":
            path = "/v1" + path
        return super().place(path, dialect, metered)


DIALECTS = {dialect.name: dialect for dialect in (
    Anthropic(), Gemini(), Interactions(), Ollama(), OpenAI(), Azure())}
UNKNOWN_DIALECT = Dialect()
NO_TEXT = (None, "count", "other", "embed", UPLOAD)  # endpoints that answer with no text
NO_LIMIT_REPLY = (*NO_TEXT, UNKNOWN)                 # endpoints at which no assistant speaks


def content_never_null(payload):
    """Returns a payload for upstreams that refuse "content": null beside tool calls."""
    messages = as_list(payload.get("messages"))
    fixed = [
        {**one, "content": ""} if dig(one, "tool_calls") and one.get("content") is None else one
        for one in messages]
    return payload if fixed == messages else {**payload, "messages": fixed}


QUIRKS = {"deepseek": content_never_null}  # name of an upstream -> change of its payloads
ONE_MODEL = re.compile("/v1(?:beta)?/models/[A-Za-z0-9_.@-]{1,256}")
FREE_METHODS = "GET HEAD OPTIONS DELETE".split()
# Bodies of these types are relayed as they come: nothing is in them that we could read.
RELAYED_TYPES = re.compile(r"(?:audio|image|video)/|application/(?:octet-stream|pdf|zip)\b")
LOOKS_LIKE_JSON = re.compile(rb"[\s\0\xef\xbb\xbf\xfe\xff]*[{\[]")  # in any Unicode encoding

# What upstreams store for an account, and where
STORED_PATH = re.compile(
    "/(files|uploads|batches|responses|conversations|threads|fine_tuning/jobs|fine-tunes"
    "|chat/completions|deferred-completion|vector_stores|assistants|containers|videos/characters"
    "|videos|evals|batchPredictionJobs|tuningJobs|ragCorpora"
    "|generation|cachedContents|interactions|tunedModels|fileSearchStores|operations|corpora"
    "|skills|agents|sessions|environments|memory_stores|vaults|libraries|datasets|embed-jobs"
    "|collections|predictions|tasks|batch/jobs|async-result|async/sonar)"
    "(?:/([^/:]+))?(?=[/:]|$)", re.IGNORECASE)
UPLOADED = ("files", "uploads")
# These are no names of stored things.
VERBS = "input_tokens compact runs generations edits extensions upload list retrieve".split()
CANCEL = ("/cancel", ":cancel")
ABOUT_THING = re.compile("[/:](?:cancel|results)$")

# Paths that manage an upstream for all its users, show what others do there, or hand out
# credentials: these parts wherever they stand,
ADMIN_PARTS = """
    client_secrets transcription_sessions auth_tokens organizations? credits billing slots
    cors-proxy (un)?load_lora_adapter(_from_tensors)? wake_?up collective_rpc scale_elastic_ep
    is_(sleeping|scaling_elastic_ep|paused) reset_(prefix|mm|encoder)_cache (start|stop)_profile
    init_weights?_(transfer_engine|update_group|send_group_for_remote_instance)
    generate_auth_token single-use-token ephemeral-tokens? api[-_]?keys?
    (start|finish)_(draft_)?weight_update destroy_weights_update_group weights_checker
    update_weight.* send_weights_to_remote_instance get_weights_by_name
    abort_requests? fault_tolerance flush_cache freeze_gc slow_down
    (release|resume)_memory_occupation (get_)?server_info (set|get)_internal_state
    (start|stop|dump)_expert_distribution_record configure_logging
    (pause|continue)_generation (open|close)_session (clear_)?hicache(_storage_backend)?
    get_load set_trace_level (add|remove)_worker
    (add|remove|list)_external_(corpus|corpora) dumper stop-generation
    realtime(api)?/(sessions|calls) chatkit/sessions auth/(keys?|grant)
    v1/(key|activity|streams?|usage|costs|balance|account|me) users?/(me|info|balance)
    api/(pull|push|create|copy|delete|blobs|signout|admin)
    models/(load|unload|sse|download|apply|delete)
    (model|lora|embedding)/(un)?load (template|override)/(switch|unload)
    backends/(apply|delete) completions/control backend/shutdown extra/abort generate/check
    repository/models""".split()
# these at the beginning, but for /api and /v1, which may stand in the upstream's own path,
ADMIN_ROOTS = """
    streams? pull push create copy delete blobs signout sleep pause resume download unload
    shutdown keys workers""".split()
# All of them, in "METHOD PATH" with a path of `fold_path`; other ends of a path where the method is
# neither GET nor HEAD; and the removal of a model
ADMIN_REQUEST = re.compile(
    "[^ ]+ (.*/(%s)|(/api|/v1)*/(%s))(/.*)?"
    "|(?!GET |HEAD )[^ ]+ .*/(models|props|lora-adapters|tools|cvectors)"
    "|DELETE .*/models/[^/]*(/[^/]*)?" % ("|".join(ADMIN_PARTS), "|".join(ADMIN_ROOTS)))


# An upstream in Go would take "MODEL" for "model", and we would have read another one.
READ_KEYS = set_of("""
    model models fallbacks stream stream_options options background
    previous_response_id conversation""") | OUTPUT_NUMBERS
# What nearly all calls have besides: no other spelling of those.
USUAL_KEYS = READ_KEYS.union("""
    messages input prompt system instructions contents temperature top_p tools tool_choice
    parallel_tool_calls response_format reasoning_effort stop seed user""".split())


class Dialects:
    """Finds the dialect and the endpoint of a request, and reads it. What any upstream could take
    for a metered endpoint is that endpoint, under its plain name; what cannot be named plainly is
    refused."""
    def __init__(self, config: Config):
        self.max_text = config.max_text_bytes
        self.aliases = config.model_aliases or {}
        self.names = {one.name: one.dialect or "openai" for one in config.all_upstreams}
        self.chooses = bool(config.upstreams)         # the model decides which upstream is asked
        self.reads_counts = self.chooses  # the model is also read of calls that only count
        self.unknown_calls = config.unknown_calls
        self.passes_admin = config.vendor_admin_paths == "on"
        self.manages = lru_cache(KNOWN_MODELS)(ADMIN_REQUEST.fullmatch)
        # By the ends of paths in lower case, the longer of two first; these, and what they mean
        self.ends = {end.lower(): (dialect, endpoint, end) for dialect in DIALECTS.values()
                     for end, endpoint in dialect.ENDPOINTS.items()}

    def split(self, path: str) -> Tuple[Optional[str], str]:
        """Returns the upstream that a path names by its first segment, and the path without it."""
        name = path[1:].partition("/")[0]
        return (name, path.removeprefix("/" + name) or "/") if name in self.names else (None, path)

    def guess(self, path: Optional[str], fields: Optional[Fields]) -> Dialect:
        """Returns the dialect of what is not metered: the shape of errors, and the header of our
        key. Both are None where no request could be read."""
        if path is None:
            return DIALECTS["openai"]
        prefix, path = self.split(path)
        with suppress(BadRequest):  # what cannot be folded is refused elsewhere
            path = fold_path(path)
        for dialect in DIALECTS.values():
            if dialect.claims(path.lower(), fields):
                return dialect
        if prefix and "authorization" not in fields:
            return DIALECTS[self.names[prefix]]
        return DIALECTS["openai"]

    def endpoint(self, method: str, path: str) -> Tuple[Optional[Dialect], Optional[str], str]:
        """Returns the dialect, None where that is not known; the endpoint, None where nothing is
        metered; and the path to use. Raises BadRequest, Forbidden."""
        folded = fold_path(path)
        request = f"{method} {self.split(folded)[1]}"
        if not self.passes_admin and self.manages(request):
            raise Forbidden
        dialect, endpoint, end = next(
            (row for end, row in self.ends.items() if folded.endswith(end)), (None, None, ""))
        # Counting is read for its model alone, where that chooses the upstream.
        is_others = endpoint == "messages" and not dialect.PATH.search(self.split(folded)[1])
        if method != "POST" or endpoint is None or is_others:
            return None, None if method in FREE_METHODS else UNKNOWN, path
        if endpoint == "count" and not self.reads_counts and PLAIN_PATH.fullmatch(path):
            return None, None, path
        if not path.endswith(end):
            path = "" if dialect.MODEL_IN_PATH.fullmatch(folded) else folded
        if not PLAIN_PATH.fullmatch(path):
            raise BadRequest("The path must be spelled plainly")
        return dialect, endpoint, path

    def place(self, method: str, path: str, query: str, fields: Fields) -> Tuple[Any, ...]:
        """Returns all that the head of a request says of its call: what a Call is made of. Raises
        BadRequest, Forbidden."""
        dialect, endpoint, path = self.endpoint(method, path)
        dialect = dialect or self.guess(path, fields)
        prefix, path = self.split(path) if self.names else (None, path)
        query = without(OVERRIDE, split_query(query)[1]) if query else ""
        stored = None
        if endpoint in (None, UNKNOWN):
            stored = self.stored_at(method, path)
            endpoint = endpoint and self.cost_of_unknown(path, stored)
        if query and (endpoint or stored):  # its usage may settle a background call
            query = without(MASK, query)
        return dialect, endpoint, path, query, prefix, stored

    async def read(self, call: Call, method: str, fields: Fields,
                   read_body: Callable[[], Awaitable[bytes]]) -> None:
        """Reads the rest of a call. `read_body` is only called, and the payload only parsed, where
        it is metered. Raises BadRequest, and what `read_body` raises."""
        model = None  # of any type
        if call.endpoint in UNNAMED:
            model = await self.read_unknown(call, fields.get("content-type", ""), read_body)
        elif call.endpoint:
            call.body = await read_body()
            model = self.read_payload(call)
        elif self.chooses and method == "GET" and ONE_MODEL.fullmatch(call.path):
            place, _, model = call.path.rpartition("/")
            call.path = place + "/" + urllib.parse.quote(self.resolve(model), safe="@")
        if isinstance(model, str):
            if len(model) > MAX_MODEL:
                raise BadRequest("The name of the model is too long")
            call.model = model
            call.resolved_model = self.resolve(model)
        call.large = len(call.body or b"") > LARGE_BODY

    def resolve(self, model: str) -> str:
        """Returns what a model's name stands for."""
        return self.aliases.get(model, model)

    @staticmethod
    def stored_at(method, path):
        """Returns what a path that is in no table says of stored things."""
        is_plain = PLAIN_PATH.fullmatch(path)
        match = STORED_PATH.search(path if is_plain else fold_path(path))
        if not match:
            return None
        collection, name = match.groups("")
        if name in VERBS:
            name = ""
        is_listed = not name and method in FREE_METHODS
        # What is not named plainly is nobody's: nothing is named "/".
        return StoredPath(collection, name if is_plain else name and "/", is_listed)

    def cost_of_unknown(self, path, stored):
        """Returns the endpoint of what is in no table, None where it is free. Raises Forbidden."""
        if stored and stored.name not in ("", "/") and path.endswith(CANCEL):
            return None
        if stored and stored.collection.lower() in UPLOADED:
            return UPLOAD
        if self.unknown_calls == "refuse":
            raise Forbidden("Calls of endpoints that are not known here are not passed on")
        # A payload that may speak of stored things must be read.
        return None if self.unknown_calls == "pass" and not stored else UNKNOWN

    async def read_unknown(self, call, content_type, read_body):
        """Reads what can be understood of a call of an endpoint that we do not know; returns the
        model, of any type. Raises as `read` does."""
        model, _ = UNKNOWN_DIALECT.requested(call.path, {})
        kind = content_type.lower()
        if "," in kind:  # an upstream could take another one of them
            raise BadRequest("The request names more than one Content-Type")
        if call.endpoint == UPLOAD or RELAYED_TYPES.match(kind):
            return model
        call.body = await read_body()
        if LOOKS_LIKE_JSON.match(call.body) or (call.body and "json" in kind):
            body_model = self.read_payload(call)
        else:
            body_model, call.put_model = read_form(call.body, content_type, call.payload)
        return model or body_model

    def read_payload(self, call):
        """Reads the payload and whether a stream is asked for; returns the model, of any type.
        Raises BadRequest."""
        call.json_body = body = JsonBody(call.body)
        if len(body.short) > self.max_text:
            raise TextTooLarge
        call.payload = payload = body.parse()
        if PLAIN_CHAT.issuperset(payload):
            call.is_plain = call.endpoint == "chat"
        elif not USUAL_KEYS.issuperset(payload):
            others = payload.keys() - READ_KEYS
            for key in READ_KEYS.intersection(map(str.casefold, others)):
                raise BadRequest(f"The key {key} must be spelled in lower case")
        dialect = call.dialect
        if call.endpoint == UNKNOWN:
            dialect = UNKNOWN_DIALECT
        elif payload.get("stream") is not None and type(payload["stream"]) is not bool:
            raise BadRequest("stream must be true or false")  # an upstream could take it for one
        model, call.stream = dialect.requested(call.path, payload)
        return model


ANSWER_KEYS = "choices", "output", "content", "data"  # an error has nothing there
WHOLE_JSON = re.compile(rb"\s*[{\[].*[}\]]\s*", re.DOTALL)
# How a list of answers begins, or goes on in lines, and what stands between two of them
LIST_BEGIN = re.compile(rb'(?:\xef\xbb\xbf)?\s*(?:\{\s*"(results|predictions)"\s*:\s*)?\[\s*(?=\{)')
NEXT_LINE = re.compile(rb"\}\r?\n\{")  # such a line end stands in no string
SEPARATOR = re.compile(r"[\s,]*")
# The latter is llama.cpp's.
EVENT_BEGIN = re.compile(rb"\s*(?:data|event|id|retry)?:")
OTHER_DATA = re.compile(rb"\{|(?<![^\r\n])data:(?!\s*(?:\[DONE\]|[\r\n]))")
# The last event of an answer
SGLANG_END = re.compile(rb'(?m)^data:.*"finish_reason"\s*:\s*\{.*$')
NAMED_FAULT = re.compile(rb"(?<![^\r\n])(?:event: ?error\s*(?![^\r\n])|error:)")


def may_be_fault(text):
    """Returns whether JSON, or a part of it, may be an error. It is text, each byte a character:
    for bytes `in` takes three times as long, and `find` twice."""
    return ('"error' in text or '"Error"' in text or 'failed"' in text
            or '"base_resp"' in text)


def front(data: bytes) -> JsonObject:
    """Returns the values that are complete at the beginning of an object that is too large to be
    kept."""
    data, values = data[:1 << 14], {}
    text = "" if is_too_complex(data) else data.decode("utf-8", "replace")
    with suppress(ValueError):
        for key, value, place in members(text):
            if place.stop < len(text):  # else the value may be incomplete
                values[key] = value
    return values


class Edit:
    """A change of a stream, event by event: `find` returns where there may be something to change
    in some bytes, their end if nowhere, and `apply` the bytes to pass on for an event."""
    MAX_HELD = 1 << 14  # bytes of an event that is awaited whole

    def end(self) -> bytes:
        """Returns the bytes to pass on when no more events come."""
        return b""

    def slice(self, data: bytes) -> Tuple[bytes, bytes]:
        """Returns what goes on of JSON that is too large to be awaited whole, and what waits for
        more of it."""
        return self.apply(data), b""


class HiddenUsage(Edit):
    """Removes the usage that we asked for and the caller did not."""

    def __init__(self, dialect: OpenAI):
        self.dialect = dialect
        self.search = dialect.usage_begin.search

    def find(self, data: bytes) -> int:
        # `in` takes three times as long.
        match = data.find(self.dialect.USAGE_MARK) >= 0 and self.search(data)
        return match.start() if match else len(data)

    def apply(self, event: bytes) -> bytes:
        """Returns an event without its usage; one that says more than that stays as it is."""
        if not self.search(event) or self.dialect.CONTENT.search(event):
            return event
        payload = self.dialect.events.payload(event)
        rest = self.dialect.without_usage(payload)
        if rest == payload:
            return event
        return self.dialect.events.replaced(event, to_json_bytes(rest)) if rest else b""


class Editor:
    """Changes a body on its way to the caller: the one place that may. An event that is not whole
    waits for its end, or for that of its JSON: nobody could have used it before. Where there are no
    `events`, all of the body is one."""
    held = b""

    def __init__(self, events: Optional[EventFraming], edit: Edit):
        self.events = events
        self.edit = edit

    def feed(self, payload: bytes) -> bytes:
        """Returns what goes on."""
        data = self.held + payload
        if self.events is None:
            return self.feed_slice(data)
        self.held = b""
        if self.events.at_boundary(data) and self.edit.find(data) == len(data):
            return data  # the usual case
        *events, self.held = self.events.split(data)
        # One that may change does so with all of its end.
        if events and not self.held and self.edit.find(events[-1]) < len(events[-1]) and (
                events[-1].endswith(b"\r") or not self.events.at_boundary(events[-1])):
            self.held = events.pop()
        goes = b"".join(map(self.edit.apply, events))
        if len(self.held) > self.edit.MAX_HELD:
            goes += self.feed_slice(self.held)
        return goes

    def feed_slice(self, data):
        goes, self.held = self.edit.slice(data)
        return goes

    def flush(self) -> bytes:
        """Returns the bytes that are still held back at the end, which may lack a line end."""
        held = self.held
        self.held = b""
        shown = self.edit.apply(held) if held else b""
        rest = self.edit.end()
        if not rest or not self.events.payload(held):
            return rest + shown
        return shown + (b"" if self.events.at_boundary(shown) else self.events.ends[0]) + rest


class HiddenKey(Edit):
    """Writes stars over a key of ours, which an error may quote."""

    def __init__(self, key: str):
        self.key = key.encode()

    def apply(self, event: bytes) -> bytes:
        return event.replace(self.key, b"*" * len(self.key))

    def slice(self, data: bytes) -> Tuple[bytes, bytes]:
        """Keeps the end, which may begin a key."""
        shown = self.apply(data)
        end = max(0, len(shown) - len(self.key) + 1)
        return shown[:end], shown[end:]


def flush_all(readers, data: bytes = b"") -> bytes:
    """Returns what goes on of the last of a body through these, one after the other."""
    for reader in readers:
        data = (reader.feed(data) if data else b"") + reader.flush()
    return data


class Inflater:
    """Decompresses gzip, which may have many parts (RFC 1952 2.2), or deflate."""
    MAX_PARTS = 1000  # in a piece
    part = None

    def feed(self, data: bytes, most: int) -> bytes:
        """Returns what is packed in a piece. Raises zlib.error for more than `most` bytes, too."""
        unpacked = []
        while data:
            if self.has_ended():
                if self.part and data[0] != 0x1f:
                    break  # padding
                # Some leave out the header of deflate (RFC 1950 2.2); nothing else begins with it.
                headed = data[0] == 0x1f or data[0] & 15 == 8
                self.part = zlib.decompressobj(47 if headed else -15)
            unpacked.append(self.part.decompress(data, most + 1))
            data = self.part.unused_data
            most -= len(unpacked[-1])
            if most < 0 or len(unpacked) > self.MAX_PARTS:
                raise zlib.error
        return b"".join(unpacked)

    def has_ended(self) -> bool:
        return not self.part or self.part.eof


class ErrorUnpacker:
    """Passes on an error once it is complete, decompressed, or `instead` of it where it cannot be
    read."""
    MAX_SIZE = 1 << 16  # bytes, packed or not

    def __init__(self, readable: bool, instead: bytes):
        self.readable = readable
        self.instead = instead
        self.packed = b""

    def feed(self, payload: bytes) -> bytes:
        if len(self.packed) <= self.MAX_SIZE:
            self.packed += payload
        return b""

    def flush(self) -> bytes:
        inflater = Inflater()
        with suppress(zlib.error):
            unpacked = inflater.feed(self.packed, self.MAX_SIZE)
            if self.readable and inflater.has_ended():
                return unpacked
        return self.instead


class UsageReader:
    """Reads what a response reports of usage, how much text it holds, and how it says that it
    ended, from a copy of it on its way past. What came is kept up to a limit, then searched and
    dropped, but for the last events; of a line or JSON above MAX_LINE only the end is kept, and in
    a list of an answer above MAX_UNPACKED."""
    MAX_KEPT = 3 << 12
    MAX_LINE = 1 << 18
    LINE_END = 1 << 13
    LAST_EVENTS = 1 << 11
    MAX_UNPACKED = 1 << 20
    MAX_ANSWERS = 1 << 12  # answers that are read at once

    characters = 0
    kind = PROSE_KIND              # kind of text, by `kind_of_text`
    usual: Optional[Usage] = None  # found by usual_usage, without parsing
    model: Optional[str] = None    # the model that served, if the response names it
    tier: Optional[str] = None     # the service tier, likewise
    counts: JsonObject = {}        # replaced as a whole, never changed
    ended = False         # the model has stopped
    closed = False        # the last event has passed, or the end was reported otherwise
    end_is_read = False
    # Characters of text in a byte: the rest of a long stream is taken to be like its beginning,
    # because counting all of it would cost 8 us an event.
    density = 0.0

    def __init__(self, call, streamed, readable, packed=False):
        """`readable`: it can be read, but for what is `packed`."""
        self.dialect = call.dialect
        self.call = call
        self.endpoint = (call.owes or call).endpoint
        self.streamed = streamed
        self.readable = readable
        self.inflater = Inflater() if packed else None
        self.kept = bytearray()
        # As in Call:
        self.lost = False     # the amount of text is unknown
        self.listed = ""      # key of the list, if the response is a list of answers
        self.cut = False      # the beginning of a line or of JSON was dropped
        self.final: Optional[bool] = None  # whether nothing more will be reported, by is_final
        self.running = False  # the response says that the call still runs
        self.fault = 0        # status of the error, if the response is one
        self.said_nothing = False  # an error or a stream without an end that held no text
        self.compact_above = 3 * self.LAST_EVENTS if streamed else self.MAX_KEPT

    def __repr__(self) -> str:
        return (f"<UsageReader {self.dialect.name} {self.endpoint}, keeps {len(self.kept)} bytes,"
                f" found {self.counts}>")

    def feed(self, payload: bytes) -> bytes:
        """Takes a piece of the body, and returns it."""
        piece = self.unpack(payload) if self.inflater else payload
        self.kept += piece
        if len(self.kept) > self.compact_above:
            self.compact()
        return payload

    def unpack(self, payload):
        """Returns what is packed in a piece (RFC 9110 8.4.1); it and the rest are unreadable where
        that fails, or is so much that it would hold the loop."""
        with suppress(zlib.error):
            return self.inflater.feed(payload, self.MAX_UNPACKED)
        self.inflater = None
        self.readable = False
        return payload

    def flush(self) -> bytes:
        return b""

    # -- what it says

    def compact(self):
        """Drops what was kept, after a look at it; the last lines stay, or the end of one that is
        too long."""
        data = bytes(self.kept)
        if self.streamed:
            end = begin_of_line(data, len(data) - self.LAST_EVENTS)
        else:
            end = self.end_of_answers(data)
        if len(data) - end > (self.MAX_UNPACKED if self.listed else self.MAX_LINE):
            if not self.streamed and not self.cut:
                self.final = False  # as long as nothing behind it tells
                self.note(front(data))
            self.lost = self.endpoint not in NO_TEXT
            self.cut = True
            end = len(data) - self.LINE_END
        passed = data[:end]
        if passed and not self.density:
            self.density = self.count_characters(passed) / end
        if not self.cut:  # it may be an image
            self.characters += round(end * self.density)
        elif self.streamed and passed.endswith(b"\n"):
            self.cut = False  # that line has ended
        if self.streamed:
            self.scan_for_usage(passed)
        del self.kept[:end]
        self.compact_above = max(self.compact_above, 2 * len(self.kept))  # looking is not quadratic

    def end_of_answers(self, data):
        """Notes what each answer in a list tells; returns where the first begins that is not
        whole, 0 where this is no list."""
        start = 0
        if not self.listed:
            begin = LIST_BEGIN.match(data)
            if begin:
                start, self.listed = begin.end(), (begin[1] or b"results").decode()
            elif LOOKS_LIKE_JSON.match(data) and NEXT_LINE.search(data):
                # Each line may tell what was used until then.
                many = self.call.owes or self.call.output_limit()[1] > 1
                self.listed = "results" if many else "lines"
        if not self.listed or self.cut or is_too_complex(data):
            return 0
        text, at = data[start:].decode("utf-8", "surrogateescape"), 0
        with suppress(ValueError):
            for _ in range(self.MAX_ANSWERS):
                payload, end = PLAIN_JSON.raw_decode(text, at)
                if type(payload) is dict:
                    self.note_answer(payload, self.listed in self.dialect.ANSWERS)
                at = SEPARATOR.match(text, end).end()
            self.final = False  # the rest waits, and may never be read
        return start + len(text[:at].encode("utf-8", "surrogateescape"))

    def note_answer(self, payload, adds=False):
        """Adds what one of several answers reports; returns its counts. The use of several models
        together has no price, so not all is known then."""
        before = self.model
        counts = self.dialect.counts_in(payload)
        self.counts = merged(self.counts, counts, operator.add if adds else max)
        self.note_server(payload)
        if adds and before not in (None, self.model):
            self.final = False
        return counts

    def scan_for_usage(self, data):
        """Notes the events that report usage: the first and the last, for APIs that report it in
        parts or more than once; and the last that says how the call was served."""
        told, events = [], self.dialect.events
        if data.find(self.dialect.USAGE_MARK) >= 0:  # much faster than a regular expression
            told = [match.start() for match in self.dialect.usage_begin.finditer(data)]
        tier = -1 if self.tier else data.rfind(self.dialect.TIER_MARK)
        for place in sorted({tier, *told[:1], *told[-1:]} - {-1}):
            self.note(self.object_at(data, place))
        if self.repeats_text(data):
            for event in SGLANG_END.findall(data):
                self.note_answer(events.payload(event), adds=True)
        if self.counts and self.final is None:  # what was told before more text is not all of it
            rest = data[told[-1]:] if told else data
            self.final = False if self.count_characters(rest) else None

    def object_at(self, data, place):
        """Returns the JSON object of the event in which a place is."""
        events = self.dialect.events
        line = LINE.match(data, begin_of_line(data, place))[0]
        payload = events.payload(line) or self.dialect.find_usage(line, OPENINGS)
        if payload:
            return payload
        for event in events.split(data):  # its JSON has more lines
            place -= len(event)
            if place < 0:
                break
        return events.payload(event)

    def repeats_text(self, data):
        """Returns whether each event has all of the text, as in SGLang's own streams, which tell
        what each answer used so far."""
        return self.endpoint == UNKNOWN and data.find(b'"meta_info"') >= 0

    def note(self, payload: JsonObject):
        """Notes what a response, an event or a part of one reports, if anything."""
        counts = self.note_answer(payload)
        if counts:
            final = self.dialect.is_final(payload, counts)
            if final is not None or not self.final:
                self.final = final

    def note_server(self, payload):
        """Notes which model served the call, and in which tier."""
        model, tier = self.dialect.served(payload)
        self.model = model or self.model
        self.tier = tier or self.tier

    def read_end(self, whole):
        """Reads what is still kept, when no more comes. A response that is not `whole` is believed
        of events alone: in JSON it could be anybody's."""
        if self.end_is_read or not self.readable:
            return
        self.end_is_read = True
        data = bytes(self.kept)
        if self.streamed:
            self.read_events(data)
        elif whole:
            self.ended = bool(data or self.listed)
            self.read_json(data)

    def read_events(self, data):
        """Notes what events report, and what the last three say of their stream's end."""
        framing = self.dialect.events
        end = data.removesuffix(framing.event(LAST_DATA)).rstrip(b"\r\n")
        if self.counts or self.tier or not self.is_usual(end, begin_of_line(end, len(end))):
            self.scan_for_usage(data)
        last = data[begin_of_line(data, len(data) - self.LAST_EVENTS):]
        if last.endswith(framing.event(LAST_DATA)) and last.find(b"error") < 0 and (
                last.find(b"{") >= 0 and not may_be_fault(last.decode("latin-1"))):
            self.closed = self.ended = True  # the usual case
            return
        events = 0
        for event in reversed(framing.split(last)):
            events += self.note_end(event, data)
            if events == 3:
                break
        self.ended |= self.closed or bool(self.final)

    def note_end(self, event, data):
        """Notes what one of the last events of a stream says of its end; returns whether it says
        anything."""
        content = self.dialect.events.all_data(event) or event  # some send an error as it is
        payload = object_in(content)
        if NAMED_FAULT.search(event):
            self.fault = self.fault or self.dialect.fault(payload) or fault_status(payload)
        if content.strip() == LAST_DATA:  # it may be all that there is
            self.closed = self.density > 0 or bool(OTHER_DATA.search(data))
            return True
        self.closed |= self.dialect.is_last(payload)
        self.ended |= self.closed or self.dialect.has_reason(payload)
        on_made = self.call.on_made
        names = on_made and self.closed and names_made(payload)
        if names:
            on_made(names)
        if self.counts:
            self.note_server(payload)
        else:  # it may be told without a mark
            self.note(payload)
        if not self.counts or may_be_fault(content.decode("latin-1")):
            self.fault = self.fault or self.dialect.fault(payload)
        return bool(payload)

    def read_json(self, data):
        """Notes what JSON reports. Of a large one, little is parsed."""
        small = not (self.cut or self.listed) and (
            len(data) <= self.MAX_KEPT or data.find(self.dialect.SEARCH_MARK) >= 0)
        if small and self.is_usual(data):
            return
        payload = object_in(data) if small else {}
        if not payload and EVENT_BEGIN.match(data):  # under another type
            self.streamed = True
            return self.read_events(data)
        if not payload:
            data = data[self.end_of_answers(data):]
            # Gemini's stream is an array.
            payload = self.dialect.find_usage(data.rstrip(b"] \t\r\n"), OPENINGS[:1])
            if not self.cut:
                within = not payload and self.dialect.USAGE_MARK in data
                payload = object_in(data) if within else {**front(data), **payload}
        if payload:
            self.note_json(payload, data)

    def is_usual(self, data, begin=0):
        """Returns whether JSON, or the event from `begin` on, is no error and tells of usage as
        most servers do."""
        text = data.decode("latin-1")
        if not may_be_fault(text[begin:]):
            self.usual = self.dialect.usual_usage(text, self.call.upstream_model, begin)
        return self.usual is not None

    def note_json(self, payload, data):
        self.note_answer(payload)
        if self.cut and self.listed not in self.dialect.ANSWERS:
            self.final = None  # the last one tells what all of them used
        state = payload.get("status") or payload.get("state") or dig(payload, "metadata", "state")
        # Google says BATCH_STATE_FAILED and the like.
        self.closed = str(state).lower().rpartition("state_")[2] in self.dialect.LAST_STATES
        self.running = type(state) is str and not self.closed
        if not self.counts or may_be_fault(data.decode("latin-1")):
            self.fault = self.dialect.fault(payload)
        said = map(type, filter(None, map(payload.get, ("message", "detail", "msg"))))
        if str in said and self.endpoint not in NO_LIMIT_REPLY and not (
                self.counts or self.lost or any(map(payload.get, ANSWER_KEYS))
                or any(self.dialect.said(data, self.endpoint, False))):
            self.fault = self.fault or fault_status(payload)  # no assistant writes it like this

    def ending(self, whole: bool) -> str:
        """Returns how a response ended by what it says itself; `whole`: its body has come."""
        self.read_end(whole)
        if whole and self.ended and not self.fault:  # the usual case
            return "ok"
        failed = self.fault or (whole and not self.ended and self.tells_end())
        if failed and not self.said_nothing:
            used, complete = self.reported_usage(whole=False)
            self.said_nothing = not (self.output_characters() or (complete and used.output))
        if self.fault:
            return "upstream_status"
        return "ok" if whole and not failed else "upstream_cut"

    def has_closed(self) -> bool:
        """Returns whether a stream that is not complete has reached its own end."""
        self.ending(whole=False)
        return self.closed

    def tells_end(self):
        """Returns whether a response that is whole says so, and that could be read."""
        known = self.dialect.LAST_TYPES or self.dialect.REASON[0]
        return bool(known) and self.readable and not self.cut and (
            self.endpoint not in NO_LIMIT_REPLY)

    def reported_usage(self, whole: bool) -> Tuple[Optional[Usage], bool]:
        """Returns the usage that was reported, if it was; and whether nothing is missing from
        it."""
        self.read_end(whole)
        usage = self.usual or self.dialect.usage(self.counts, self.model, self.tier)
        complete = whole or self.closed if self.final is None else self.final
        return usage, usage is not None and complete

    def most_characters(self) -> float:
        """Returns the most characters that passed: those counted, and for what is kept its length,
        or what is usual in events."""
        density = self.density or (0.03 if self.streamed else 1)
        return self.characters + len(self.kept) * density

    def output_characters(self) -> int:
        """Returns the weight of the text that passed."""
        self.characters += self.count_characters(bytes(self.kept))
        self.kept.clear()
        return self.characters

    def finish_reasons(self) -> List[str]:
        """Returns why the model stopped, where what is kept says so."""
        return self.dialect.reasons(bytes(self.kept), self.endpoint, self.streamed)

    def count_characters(self, data):
        """Returns the weight of the text in events or in JSON; of what cannot be read, all."""
        if self.endpoint in NO_TEXT or (self.cut and not self.streamed) or self.repeats_text(data):
            return 0  # numbers and pictures are no text, nor is any JSON that is so large
        if not (self.readable and (
                self.streamed or self.listed or WHOLE_JSON.fullmatch(data))):
            return len(data)
        said = self.dialect.said(data, self.endpoint, self.streamed)
        if not self.characters:
            self.kind = kind_of_text(max(said, key=len, default=""))
        return sum(map(text_weight, said))


# --------------------------------------------------------------------------------------------------
# Redaction: what must not leave, found in text, replaced by placeholders, and put back in what the
# model answers. It knows no sockets, no buckets and no wire names.
# --------------------------------------------------------------------------------------------------

# What must not leave, in a text: where it begins and ends, and what it is, as REDACT names it
Finding = Tuple[int, int, str]


class Shape(NamedTuple):
    """How what must not leave looks: `mark` stands in each text that holds one, and so does a match
    of `hint`; `search` takes linear time, and `check` returns where what it found ends, 0 where
    that is none. In so many characters as `step` says it is searched for at once."""
    kind: str
    mark: str
    search: "re.Pattern[str]"
    check: Callable[["re.Match[str]"], int]
    hint: str
    longest: int  # characters of a match
    step: int = 1 << 14


URL_PASSWORD = re.compile(r"[A-Za-z]://[^\s/@]*:\Z")  # before it


def end_of_email(match: "re.Match[str]") -> int:
    """Returns the end of an address, 0 for what is a password and a host in a URL."""
    before = match.string[max(0, match.start() - 80):match.start()]
    is_password = before.endswith(":") and URL_PASSWORD.search(before)
    return match.end() if match.lastindex and not is_password else 0


DOUBLED = bytes.maketrans(b"0123456789", b"0246813579")  # and the digits of that added up
# Issuers' prefixes, and how many digits their numbers have.
CARD_NUMBERS = re.compile(
    rb"4(?:[0-9]{12}|[0-9]{15}|[0-9]{18})"               # Visa
    rb"|(?:5[1-5][0-9]{2}|222[1-9]|22[3-9][0-9]|2[3-6][0-9]{2}|27[01][0-9]|2720)[0-9]{12}"
    rb"|3[47][0-9]{13}"                                  # American Express
    rb"|3(?:0[0-59]|[689][0-9])[0-9]{11,16}"             # Diners Club
    rb"|(?:6011|64[4-9][0-9]|65[0-9]{2})[0-9]{12,15}"    # Discover
    rb"|35(?:2[89]|[3-8][0-9])[0-9]{12,15}"              # JCB
    rb"|62[0-9]{14,17}"                                  # UnionPay
    rb"|(?:50[0-9]{2}|5[6-9][0-9]{2}|6[0-9]{3})[0-9]{10,15}")  # Maestro


def is_card(number: str) -> bool:
    """Tells whether a card can have this number: its last digit is right (ISO/IEC 7812-1), and not
    that of a product, an EAN, which is as long as some old cards'."""
    digits = number.encode().translate(None, b" -")
    total = sum(digits[::-2]) + sum(digits[-2::-2].translate(DOUBLED)) - 48 * len(digits)
    if total % 10 or not CARD_NUMBERS.fullmatch(digits):
        return False
    return len(digits) != 13 or (sum(digits[::2]) + 3 * sum(digits[1::2])) % 10 != 0


def end_of_card(match: "re.Match[str]") -> int:
    return match.end() if is_card(match[0]) else 0


# Of four digits each, but not in a row of many
CARD_GROUPS = [re.compile(
    r"[0-9]{4}([ -])[0-9]{4}\1[0-9]{4}\1%s(?![A-Za-z0-9_-]|\1[0-9]{4}\1[0-9]{4}(?![0-9]))" % end)
               for end in (r"[0-9]{4}\1[0-9]{1,3}", "[0-9]{1,4}")]


def end_of_card_groups(match: "re.Match[str]") -> int:
    """Returns the end of a card's number in groups; the first group is taken for its beginning."""
    for groups in CARD_GROUPS:
        number = groups.match(match.string, match.start())
        if number and is_card(number[0]):
            return number.end()
    return 0


# How many characters an account's number has, by country (SWIFT's IBAN registry).
IBAN_LENGTHS = """15:NO 16:BE 18:DK,FI,FK,FO,GL,NL,SD 19:MK,SI 20:AT,BA,EE,KZ,LT,LU,MN,XK
    21:CH,HR,LI,LV 22:BG,BH,CR,DE,GB,GE,IE,ME,RS,VA 23:AE,GI,IL,IQ,OM,SO,TL
    24:AD,CZ,ES,MD,PK,RO,SA,SE,SK,TN,VG 25:LY,PT,ST 26:IS,TR 27:BI,DJ,FR,GR,IT,MC,MR,SM
    28:AL,AZ,BY,CY,DO,GT,HN,HU,LB,NI,PL,SV 29:BR,EG,PS,QA,UA 30:JO,KW,MU,YE 31:MT,SC 32:LC 33:RU"""
LETTER_NUMBERS = {65 + n: str(10 + n) for n in range(26)}


def iban_pattern(length):
    """Returns what follows a country, in groups of four or in one."""
    groups, rest = divmod(length - 4, 4)
    return re.compile("[0-9]{2}(?:[ -]?[A-Z0-9]{4}){%d}%s(?![A-Za-z0-9])" % (
        groups, "[ -]?[A-Z0-9]{%d}" % rest if rest else ""))


IBANS = {country: iban_pattern(int(row[:2])).match
         for row in IBAN_LENGTHS.split() for country in row[3:].split(",")}


def end_of_iban(match: "re.Match[str]") -> int:
    """Returns the end of an account's number: its country decides the length, and its check digits
    must be right (ISO 7064, mod 97-10)."""
    follows = IBANS.get(match[0][:2])
    rest = follows and follows(match.string, match.start() + 2)
    if not rest:
        return 0
    spelled = rest[0].replace(" ", "").replace("-", "")
    number = "".join((spelled[2:], match[0][:2], spelled[:2]))
    return rest.end() if int(number.translate(LETTER_NUMBERS)) % 97 == 1 else 0


# Country codes (ITU-T E.164), each with what may follow.
PHONES = r"""\+(?<![A-Za-z0-9_+.].)(?:1[ .-]?\(?[2-9][0-9]{2}\)?[ .-]?[2-9][0-9]{2}[ .-]?[0-9]{4}
    |7(?:[ ()./-]{0,2}[0-9]){10}
    |(?:2[07]|3[0-469]|4[013-9]|5[1-8]|6[0-6]|8[1246]|9[0-58])(?:[ ()./-]{0,2}[0-9]){7,11}
    |(?:2[1-689][0-9]|3[578][0-9]|42[0-9]|5[09][0-9]|6[789][0-9]|80[08]|85[0-9]|87[08]|88[0-9]
    |9[679][0-9])(?:[ ()./-]{0,2}[0-9]){6,11})"""
# How numbers are written at home, in each of PHONE_COUNTRIES
NATIONAL_PHONES = (
    r"(?:\([2-9][0-9]{2}\)\ ?|[2-9][0-9]{2}[.-])[2-9][0-9]{2}[.-][0-9]{4}",
    r"(?![0-9]{2}-[0-9]{2}-[0-9]{4})\(?0[1-9][0-9]{0,4}\)?[ /-]?[0-9]{2,9}(?:[ -][0-9]{2,5}){0,4}",
    r"[2-9][0-9]{2}(?:\ [0-9]{3}){2}|[2-9][0-9]{2}(?:-[0-9]{3}){2}",
    r"[2-9][0-9](?:\ ?[0-9]{2}){3}")


def end_of_phone(match: "re.Match[str]") -> int:
    """Returns the end of a phone number without a country's code, 0 if it has too few or too many
    digits."""
    return match.end() if 8 <= len(re.findall("[0-9]", match[0])) <= 12 else 0


# How vendors' keys look
SECRETS = r"""
    sk-(?:proj|svcacct|admin|ant|or|lf)-[A-Za-z0-9_-]{20,200}
    sk-(?=[A-Za-z]{0,60}[0-9])[A-Za-z0-9]{20,200}
    sk-(?=[a-z0-9_-]{0,60}[A-Z])(?=[A-Za-z_-]{0,60}[0-9])[A-Za-z0-9_-]{32,200}
    AIza[A-Za-z0-9_-]{35} ya29\.[A-Za-z0-9_-]{20,500} GOCSPX-[A-Za-z0-9_-]{28}
    A(?:KIA|SIA|BIA|CCA)[A-Z2-7]{16} gh[pousr]_[A-Za-z0-9]{36,255} github_pat_[A-Za-z0-9_]{22,255}
    gl(?:pat|dt|rt|cbt|ptt|ft|imt|agent|soat|ffct|oas)-[A-Za-z0-9_-]{20,255}
    xox[abeoprs]-[A-Za-z0-9-]{10,255} xapp-[0-9]-[A-Za-z0-9-]{20,255}
    sk_(?:live|test)_[A-Za-z0-9]{16,255} rk_(?:live|test)_[A-Za-z0-9]{16,255}
    whsec_[A-Za-z0-9+/=]{24,255} hf_[A-Za-z0-9]{30,60} api_org_[A-Za-z]{34} npm_[A-Za-z0-9]{36}
    pypi-AgEIcHlwaS5vcmc[A-Za-z0-9_-]{50,500} dop_v1_[0-9a-f]{64} pplx-[A-Za-z0-9]{40,80}
    SG\.[A-Za-z0-9_-]{22}\.[A-Za-z0-9_-]{43} xai-[A-Za-z0-9]{60,120} gsk_[A-Za-z0-9]{40,80}
    r8_[A-Za-z0-9]{37} nvapi-[A-Za-z0-9_-]{60,120}"""
WEB_TOKEN = r"""e(?<![A-Za-z0-9_-].)yJ[A-Za-z0-9_-]{10,3000}\.eyJ[A-Za-z0-9_-]{10,8000}
    \.[A-Za-z0-9_-]{10,1000}(?![A-Za-z0-9])"""
KEY_HEADERS = r"(?:[\\\s]{1,8}[A-Za-z-]{3,20}:\ [^\n\\]{1,100}(?![^\n\\])){0,3}"
PRIVATE_KEY = r"""-----BEGIN\ ((?:[A-Z]+\ ){0,3}PRIVATE\ KEY(?:\ BLOCK)?)-----%s
    [A-Za-z0-9+/=\\\s]{64,14000}(?:-----END\ \1-----)?""" % KEY_HEADERS
# Global addresses (RFC 6890) that follow no word for a version; of IPv6 those that are given out.
# The second group is of what may as well be a version, or the number of a section or of a field of
# certificates (2.5.29.15).
IPV4 = r"""([1-9])(?<![A-Za-z0-9_.+~^-].)(?<![=<>~!]=.)(?<![A-Za-z0-9]/.)
    (?<!(?<![A-Za-z])[Ss]ection\ .)(?<!ersion\ .)(?<!ersion:\ .)
    (?<!ersion=.)(?<!ersion":\ ".)(?<!ersion\ =\ ".)
    (?!(?<=1)(?:0|27|69\.254|72\.(?:1[6-9]|2[0-9]|3[01])|92\.(?:168|0\.[02])|98\.(?:1[89]|51\.100)
        |00\.(?:6[4-9]|[7-9][0-9]|1[01][0-9]|12[0-7]))\.
    |(?<=2)(?:03\.0\.113|2[4-9]|[3-5][0-9])\.|[0-9]*\.[0-9]+\.0\.0(?![0-9.]))
    (?:(?<![@/=].)(?!\.\1\.\1\.\1|\.8\.4\.4)
    (?=(\.[0-9]\.(?:[0-9]|29)\.[0-9]{1,2})(?![0-9]|[:/][0-9])))?
    (?:(?<=1)[0-9]{0,2}|(?<=2)(?:[0-4][0-9]?|5[0-5]?|[6-9]?)|(?<=[3-9])[0-9]?)
    (?:\.(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])){3}(?![A-Za-z0-9_+-]|\.[A-Za-z0-9])"""
# The words for these, each with a group, and for hosts. Each begins with a letter of its own: that
# is searched for ten times as fast.
TOLD_BEFORE = re.compile(r"(?:v(e)rsions?|s(e)ctions?|o(?<![a-z].)(i)d|p(?<![a-z].)(i)p|e(\.)g"
                         r"|address|client|dns|from|host|ip|listen(?:s|ing)|nameserver|peer"
                         r"|reached|run(?:s|ning) (?:at|on)|server)\b")


def end_of_ipv4(match: "re.Match[str]") -> int:
    """Returns the end of an address; 0 if it may be a version, as the last telling word shortly
    before it is one for versions."""
    if match[2] is None:
        return match.end()
    told = TOLD_BEFORE.findall(match.string[max(match.start() - 200, 0):match.start()].lower())
    return 0 if told and any(told[-1]) else match.end()


IPV6 = r"""[23](?<![A-Za-z0-9_:.].)(?!(?:[0-9a-f]{0,4}:){8})
    (?!(?<=2)(?:001:(?:0?db8|0?[01]?[0-9a-f]{0,2}):|002:)|(?<=3)fff:0)
    [0-9a-f]{3}(?:(?::[0-9a-f]{1,4}){7}|(?::[0-9a-f]{1,4}){0,5}::
    (?:[0-9a-f]{1,4}(?::[0-9a-f]{1,4}){0,5})?)(?![A-Za-z0-9_:]|\.[0-9])"""


def shape(kind, pattern, check=re.Match.end, mark="", hint="", longest=1 << 10):
    """Returns a Shape. A search for one character of a set is ten times as fast as one for what
    looks around: patterns begin with a character, and look back from behind it."""
    search = re.compile(pattern, re.ASCII | re.VERBOSE)
    return Shape(kind, mark, search, check, hint or re.escape(mark), longest)


LONG_WORD = "[A-Za-z0-9_-]{8}"  # every secret holds one
SHAPES = (
    shape("email", r"""  # what has no domain is taken as a whole: none of its words has one
        [A-Za-z0-9_](?<![A-Za-z0-9_].)(?!(?<=g)it@)[A-Za-z0-9_.%+'-]{0,63}
        @(?:(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}
        (?=[A-Za-z]{2})(?:[A-Za-z]{2,24}(?![A-Za-z0-9(]|[._-][A-Za-z0-9])
        |(?:com|net|org|edu|gov)(?![A-Za-z0-9_(]))()|(?=[A-Za-z0-9.-]{5}))""", end_of_email, "@"),
    shape("card", r"""[2-6](?<![A-Za-z0-9_+-].)(?<![0-9]\..)
        (?:[0-9]{12,18}|(?<=3)[0-9]{3}(?:[ ][0-9]{6}[ ]|-[0-9]{6}-)[0-9]{4,5})
        (?![A-Za-z0-9]|[_-][A-Za-z0-9]|\.[0-9])""", end_of_card, hint="[0-9]{4}"),
    shape("card", r"""[2-6](?<![A-Za-z0-9_+-].)[0-9]{3}
        (?:(?<![0-9]{4}[ ][0-9]{4}[ ].{4})(?=(?:[ ][0-9]{4}){2}[ ][0-9])
        |(?<![0-9]{4}-[0-9]{4}-.{4})(?=(?:-[0-9]{4}){2}-[0-9]))""", end_of_card_groups,
          hint="[0-9]{4}"),
    shape("iban", """[A-Z](?<![A-Za-z0-9].)[A-Z][0-9]{2}[ -]?[A-Z0-9]{4}[ -]?[A-Z0-9]{4}""",
          end_of_iban, hint="[A-Z]{2}[0-9]{2}"),
    shape("phone", PHONES + "(?<=[0-9]{2})(?![A-Za-z0-9_]|[.-][0-9])", mark="+"),
    shape("ssn", r"""[0-8](?<![A-Za-z0-9_-].)[0-9]{2}(?<!000|666)
        -(?!00)[0-9]{2}-(?!0000)[0-9]{4}(?![A-Za-z0-9_-])""", mark="-",
          hint="[0-9]{4}"),
    shape("ssn", r"""[0-8](?<![A-Za-z0-9_-].)[0-9]{2}(?<!000|666)  # in no row of short numbers
        (?<!(?<![0-9])[0-9][ ]...)(?<!(?<![0-9])[0-9]{2}[ ]...)(?<!(?<![0-9])[0-9]{3}[ ]...)
        [ ](?!00)[0-9]{2}[ ](?!0000)[0-9]{4}
        (?![A-Za-z0-9_-]|[ ][0-9]{1,3}(?![0-9])(?![ ][0-9]{2}[ ][0-9]{4}))""", hint="[0-9]{4}"),
    shape("ip", IPV4, end_of_ipv4, ".", hint=r"[0-9]\.[0-9]"),
    shape("ip", IPV6, mark=":", hint="[0-9a-f]:"),
    shape("secrets", "(?:%s)(?![A-Za-z0-9])" % "|".join([
        "%s(?<![A-Za-z0-9_-].)%s" % (one[0], one[1:]) for one in SECRETS.split()]), hint=LONG_WORD),
    shape("secrets", WEB_TOKEN, mark="eyJ", longest=1 << 14),
    shape("secrets", PRIVATE_KEY, mark="PRIVATE KEY", longest=1 << 14),
)


# In a word, as keys are, or as the lot of it may be in one
KEY_WORD = r"[A-Za-z0-9](?<![A-Za-z0-9_-].)[A-Za-z0-9_-]{7,255}"
SHORTEST_KEY = 8  # characters: a shorter one may be a word of any text


def shapes_of_keys(keys: Collection[str], knows: Callable[[str], bool]) -> List[Shape]:
    """Returns the shapes of our own keys: of `keys`, and of the words that `knows` says are
    keys."""
    lengths = {len(key) for key in keys} | {len(new_secret())}

    def end(match):
        word = match[0]
        return match.end() if len(word) in lengths and (word in keys or knows(word)) else 0

    odd = [re.escape(key) for key in sorted(keys, key=len, reverse=True)
           if len(key) >= SHORTEST_KEY and not re.fullmatch(KEY_WORD, key)]
    shapes = [shape("secrets", KEY_WORD, end, hint=LONG_WORD)]
    return shapes + [shape("secrets", "(?:%s)" % "|".join(odd), longest=1 << 14)] * bool(odd)


# A character that may be one of a value, spelled as in JSON, or in JSON in that; and any other one
ESCAPED = re.compile(r"\\{1,8}u00([2-7][0-9a-fA-F])")
OTHER_ESCAPED = re.compile(r"\\u(?!00[2-7])[0-9a-fA-F]{4}")
CUT_ESCAPE = re.compile(r"\\{1,8}(?:u[0-9a-fA-F]{0,3})?\Z")


def unescaped(match: "re.Match[str]") -> str:
    return chr(int(match[1], 16))


class Redactor:
    """Finds what must not leave. `patterns` are Shapes of the configuration's own, `allow` globs of
    what may leave, and `countries` those whose numbers of phones are known without a code."""
    SLICE = 1 << 14  # characters of a text, and a quarter more for what begins in these
    LONGEST = 320    # characters of the last word, which may go on
    LARGE = 4096  # characters: a text of more is searched without a look for hints

    def __init__(self, kinds: Collection[str], patterns: Sequence[Shape] = (),
                 allow: Sequence[str] = (), countries: Sequence[str] = ()):
        """`patterns` stand for what is looked for in any case."""
        self.shapes = [one for one in SHAPES if one.kind in kinds]
        self.shapes += [
            shape("phone", r"(?<![A-Za-z0-9_+.-])(?:%s)(?![A-Za-z0-9_:-])" % pattern, end_of_phone,
                  hint="[0-9]{2}")
            for names, pattern in zip(PHONE_COUNTRIES, NATIONAL_PHONES)
            if "phone" in kinds and not set(countries).isdisjoint(names.split())]
        self.shapes += patterns
        self.allow = [glob.lower() for glob in allow]
        # {Dialect: (how its events with text look, the block of that)}: how those of a stream are
        # is known, nearly always, from the one before, which spares each half a millisecond
        self.usual = {}
        hints = {one.hint for one in self.shapes} | {r"\\u00"}
        self.may_hold = re.compile("|".join(sorted(hints))).search

    def find(self, text: str) -> List[Finding]:
        """Returns what must not leave of a text, in order; nothing overlaps."""
        return list(chain.from_iterable(self.search(text)))

    def may_find(self, text: str) -> bool:
        """Returns whether a text need be searched; most short ones need not."""
        return len(text) > self.LARGE or bool(self.may_hold(text))

    def search(self, text: str) -> Iterator[List[Finding]]:
        """Yields the same in parts, many of them empty; each takes some milliseconds at most."""
        if not self.may_find(text):
            return
        if "\\" not in text:
            yield from self.search_plain(text)
            return
        plain, places, missing = yield from self.without_escapes(text)
        for findings in self.search_plain(plain):
            yield [(start + missing[bisect.bisect_left(places, start)],
                    end + missing[bisect.bisect_left(places, end)], kind)
                   for start, end, kind in findings]

    def without_escapes(self, text):
        """Removes escapes step by step; the last step returns the text, with blanks for what is no
        part of a value, and how much longer the original is from which places on."""
        pieces, places, missing = [], [], [0]
        start = 0
        while start < len(text):
            end = start + self.SLICE
            cut = CUT_ESCAPE.search(text, end - 12, end)  # none is cut
            end = cut.start() if cut else end
            part = text[start:end]
            for line_end in ("\\n", "\\r", "\\t"):
                part = part.replace(line_end, "\n\n")
            part = OTHER_ESCAPED.sub("\n" * 6, part)
            last = 0
            for match in ESCAPED.finditer(part):
                pieces += part[last:match.start()], unescaped(match)
                places.append(start + match.start() - missing[-1])
                missing.append(missing[-1] + len(match[0]) - 1)
                last = match.end()
            pieces.append(part[last:])
            start = end
            yield ()
        return "".join(pieces), places, missing

    def search_plain(self, text):
        end = 0
        ends = Counter()  # of the last match of each
        for start in range(0, len(text), self.SLICE):
            findings = []
            for one in self.shapes:
                if text.find(one.mark, start, start + self.SLICE * 5 // 4) >= 0:
                    for begin in range(start, min(len(text), start + self.SLICE), one.step):
                        findings += self.matches(one, text, begin, ends)
                        if len(text) > one.step:
                            yield ()
            # Of two that overlap the first one counts, or the longer one.
            findings.sort(key=lambda one: (one[0], -one[1]))
            apart = []
            for one in findings:
                if one[0] >= end:
                    apart.append(one)
                    end = one[1]
            yield apart

    def matches(self, one, text, begin, ends):
        """Returns what of a Shape begins in a step, and not within its last match."""
        last = begin + one.step
        begin = max(begin, ends[one.search])
        some = [match for match in one.search.finditer(text, begin, last + one.longest)
                if match.start() < last]
        if not some:  # the usual case
            return ()
        ends[one.search] = some[-1].end()
        rows = zip(map(re.Match.start, some), map(one.check, some), itertools.repeat(one.kind))
        return [row for row in rows if row[1] and not (
            self.allow and self.may_leave(text[row[0]:row[1]]))]

    def may_leave(self, value):
        return any([fnmatch.fnmatchcase(value.lower(), glob) for glob in self.allow])


spell_string = json.encoder.encode_basestring_ascii  # as dumps does, which takes ten times as long


class Masks:
    """The map of one call: which placeholder stands for which value. They are numbered by value, in
    order of appearance, so that the same history is the same text; numbers that the prompt has of
    its own are skipped."""
    PLACEHOLDER = re.compile(  # in any case, as some models change that
        r"\[\[([A-Z][A-Z0-9_]{0,47})_([1-9][0-9]{0,8})\]\]", re.ASCII | re.IGNORECASE)
    MAX_PLACEHOLDER = 64
    MAX_PLACES = 5

    def __init__(self, redactor: Redactor, opaque: str = "pass"):
        """`opaque`: what to do with what cannot be read."""
        self.redactor = redactor
        self.opaque = opaque
        self.places: List[str] = []    # where the first values stood
        self.counts: Dict[str, int] = Counter()
        self.placeholders: Texts = {}  # value -> placeholder
        self.values: Texts = {}        # placeholder -> value
        self.taken: Set[str] = set()
        self.numbers: Dict[str, int] = Counter()

    def mask(self, text: str, is_json: bool = False, anew: bool = True) -> Iterator[None]:
        """Masks a text step by step, as Redactor.search does; the last step returns it with
        placeholders. `anew`: also for values that have none yet."""
        pieces = []
        last = 0
        for findings in self.redactor.search(text):
            for start, end, kind in findings:
                value = self.value_in(text[start:end], is_json)
                if anew or value in self.placeholders:
                    pieces += text[last:start], self.placeholder(value, kind)
                    last = end
                    self.counts[kind] += 1
            yield
        return "".join((*pieces, text[last:])) if pieces else text

    @staticmethod
    def value_in(spelled, is_json):
        """Returns the value that stands so in a text, or in one that is JSON."""
        value = ESCAPED.sub(unescaped, spelled)
        return read_string(value) if is_json else value

    def mask_strings(self, text: str) -> Iterator[None]:
        """Masks the strings of JSON; numbers stay."""
        pieces = []
        last = 0
        for match in JSON_STRING.finditer(blot_escapes(text)):
            start, end = match.span(1)
            pieces += text[last:start], (yield from self.mask(text[start:end], True))
            last = end
        return "".join((*pieces, text[last:]))

    def mask_words(self, words: Words) -> Iterator[None]:
        """Masks the texts that stand at these places."""
        is_whole = words.kind == "json" and is_whole_json(words.text.encode("utf-8", "replace"))
        yield
        if is_whole:
            after = yield from self.mask_strings(words.text)
        else:
            after = yield from self.mask(words.text, words.is_json(), words.kind != "echo")
        if after == words.text:
            return
        words.put(after)
        if len(self.places) < self.MAX_PLACES:
            self.places.append(spell_place(words.place))

    def mask_payload(self, payload: JsonObject, body: bytes) -> Iterator[None]:
        """Masks a payload; the last step returns a copy, None if nothing is changed. `body` is how
        it came."""
        if b"[[" in body or b"\\u005" in body:
            for words in words_in(dict(payload)):
                yield
                for match in self.PLACEHOLDER.finditer(words.text):
                    self.taken.add(match[0].upper())
                    yield
        masked = dict(payload)
        for words in words_in(masked):
            yield
            if self.redactor.may_find(words.text):
                yield from self.mask_words(words)
        return masked if self.places else None

    def placeholder(self, value, kind):
        placeholder = self.placeholders.get(value)
        while placeholder is None or placeholder in self.taken:
            self.numbers[kind] += 1
            placeholder = "[[%s_%d]]" % (kind.upper(), self.numbers[kind])
        self.placeholders[value] = placeholder
        self.values[placeholder] = value
        return placeholder

    def describe(self) -> str:
        """Returns what kinds were found, and where; never the values."""
        more = " and elsewhere" if len(self.places) == self.MAX_PLACES else ""
        return "%s, at %s%s" % (", ".join(self.counts), ", ".join(self.places), more)

    def pass_opaque(self, refusal: Refusal):
        """Counts what cannot be read; raises the refusal where it may not pass."""
        self.counts["opaque"] += 1
        if self.opaque == "refuse":
            raise refusal


class Redaction(NamedTuple):
    """Says what must not leave, for which upstream and by whose key, and what is done with it.
    `make` returns what finds some kinds, beside patterns of the settings; `kinds` are None where
    nothing is looked for but by keys that say so; `opaque` as in Masks."""
    make: Callable[[Sequence[str]], Redactor]
    kinds: Optional[Sequence[str]]
    upstreams: FrozenSet[str]
    mode: str
    opaque: str

    def masks(self, upstream: str, key: Optional[Key]) -> Optional[Masks]:
        """Returns the Masks for a call, None if nothing is looked for."""
        if upstream not in self.upstreams:
            return None
        kinds = read_kinds(key.redact) or None if key and key.redact else self.kinds
        return None if kinds is None else Masks(self.make(kinds), self.opaque)

    def judge(self, call: Call):
        """Decides whether a call goes with placeholders or as it is. Raises MustNotLeave."""
        if self.mode == "mask":
            return
        masked, masks = call.masked, call.masks
        call.masked = call.masks = None  # it may go to another upstream as it is
        if self.mode == "block" and masked:
            raise MustNotLeave(masks.describe())


# A string of JSON, or what stands between values; and behind what, as `json_before` returns it, a
# number may stand
JSON_PART = re.compile(JSON_STRING.pattern + "|[][{},]")
BEFORE_NUMBER = re.compile(r'(?:\[,?|\{""\s*:)\s*-?\Z')


def json_before(text: str) -> str:
    """Returns a short text behind which JSON goes on as it does behind this one: what is open in
    it. It is "]" where the JSON has ended, and words may follow."""
    opened = last = ""
    end = 0
    for part in JSON_PART.finditer(blot_escapes(text)):
        last, end = part[0], part.end()
        if last in "[{":
            opened, last = (opened + last)[-64:], ""
        elif last in "]}":
            opened, last = opened[:-1], "0"
            if not opened:
                return "]"
        elif last != ",":
            end = part.end(1)
            last = '"' + "\\" * part[1].endswith("\\")
    return opened + last + text[end:end + 40]


class Restorer:
    """Puts the values back that the placeholders of a call stand for. With a `redactor`, what the
    model itself says of what must not be seen is masked for good."""
    MAX_VALUES = 1 << 20  # characters of values that an answer may grow by
    # What may become a placeholder, at the end of a text
    BEGUN = re.compile(r"\[(?:\[[A-Za-z0-9_]{0,60}\]?)?\Z")
    # The last word, of ASCII or of any letters, and groups of a number before it, backwards
    WORDS, ANY_WORDS = [re.compile(
        "%s*(?:(?<![a-z]) {1,2}(?:[A-Z]{4}|[A-Z()./-]{0,3}[0-9])%s*)*" % (letter, letter))
                        for letter in ("[!-~]", r"\S")]
    LARGE = 312  # ... which may have begun before, as a group and what stands before it is cut
    # What may become a long value: a private key or a token, in JSON or not
    BEGUN_SECRET = re.compile(r"""-----BEGIN[A-Z\ ]{0,40}\Z
        |-----BEGIN\ (?:[A-Z]+\ ){0,3}PRIVATE\ KEY(?:\ BLOCK)?-{1,5}%s
        (?:[\\\s]{1,8}[A-Za-z-]{0,20}(?::\ ?[^\n\\]{0,100})?
        |[A-Za-z0-9+/=\\\s]{0,14000}(?:-{1,5}[A-Z\ ]{0,44}-{0,5})?)\Z
        |(?:(?<![A-Za-z0-9_-])|(?<=\\[nrt]))eyJ[A-Za-z0-9_-]{0,3000}
        (?:\.[A-Za-z0-9_-]{0,8000}(?:\.[A-Za-z0-9_-]{0,1000})?)?\Z""" % KEY_HEADERS, re.VERBOSE)
    BEFORE_JSON = re.compile(rb'"(?:%b)"\s{0,9}:\s{0,9}"\Z' % "|".join(JSON_TEXTS).encode())

    def __init__(self, masks: Masks, redactor: Optional[Redactor] = None):
        self.masks = masks
        self.redactor = redactor
        self.room = self.MAX_VALUES
        self.words = self.ANY_WORDS if redactor and redactor.may_hold("") else self.WORDS

    def restore(self, text: str, is_json: bool, before: str) -> str:
        """Returns a text with values in it, which are spelled as in JSON where it is that; `before`
        is as `json_before` returns it."""
        if self.redactor and self.redactor.may_hold(text):
            text = self.without_values(text, is_json, before)
        return self.with_values(text, is_json)

    def restore_text(self, data: bytes, is_json: bool = False) -> bytes:
        text = data.decode("utf-8", "surrogateescape")
        return self.restore(text, is_json, "").encode("utf-8", "surrogateescape")

    def with_values(self, text, is_json):
        if "[[" not in text:
            return text
        return self.masks.PLACEHOLDER.sub(partial(self.value, is_json), text)

    def value(self, is_json, match):
        value = self.masks.values.get(match[0].upper())
        if value is None or len(value) > self.room:
            return match[0]
        self.room -= len(value)
        return json.dumps(value, ensure_ascii=False)[1:-1] if is_json else value

    def without_values(self, text, is_json, before):
        """Returns a text without what must not be seen, and the caller did not say; in JSON, behind
        what stands `before`, no number is that."""
        pieces = []
        last = seen = 0
        for start, end, kind in self.redactor.find(text):
            value = self.masks.value_in(text[start:end], is_json)
            if is_json and value.isdigit():
                before, seen = json_before(before + text[seen:start]), start
                if BEFORE_NUMBER.search(before):
                    continue
            if value not in self.masks.placeholders:
                pieces += text[last:start], "[[%s]]" % kind.upper()
                last = end
                self.masks.counts[kind] += 1
        return "".join((*pieces, text[last:]))

    def waiting(self, text: str) -> int:
        """Returns where the end of a text begins that may become something else with what
        follows."""
        begin = len(text)
        if "[" in text:
            begun = self.BEGUN.search(text, begin - self.masks.MAX_PLACEHOLDER)
            begin = begun.start() if begun else begin
        if not self.redactor:
            return begin
        size = self.words.match(text[:-Redactor.LONGEST - 1:-1]).end()
        begin = min(begin, len(text) - size)
        if size < self.LARGE and "eyJ" not in text and "-BEGIN" not in text:
            return begin  # the usual case
        begun = self.BEGUN_SECRET.search(text)
        return self.beside_value(text, min(begin, begun.start()) if begun else begin)

    def beside_value(self, text, begin):
        """Returns a place, or the end of a value around it, or the begin of one that may go on."""
        for start, end, _ in self.redactor.find(text) if begin else ():
            if start < begin < end:
                return end if end < len(text) else start
        return begin

    def restore_json(self, data: bytes, masks: bool = False) -> bytes:
        """Returns JSON, or events, with values in all strings, and where `masks` says so without
        what must not be seen; the rest stays as it is spelled."""
        masks = masks and self.redactor
        if not masks and b"[[" not in data and b"\\u005" not in data:
            return data
        text = data.decode("utf-8", "surrogateescape")
        places = [match.span(1) for match in JSON_STRING.finditer(blot_escapes(text))]
        strings = [text[start:end] for start, end in places]
        are_json = [key in JSON_TEXTS for key in ["", *strings]]
        words = ["" if is_json else one for one, is_json in zip(strings, are_json)]
        if masks:
            words = self.without_values_in(words)
        rows = zip(strings, words, are_json)
        pieces = []
        last = 0
        for (start, end), (one, other, is_json) in zip(places, rows):
            shown = self.restore_string(one if is_json else other, is_json, masks)
            pieces += text[last:start], shown
            last = end
        return "".join((*pieces, text[last:])).encode("utf-8", "surrogateescape")

    def without_values_in(self, strings):
        """Masks strings as JSON spells them, all at once: there may be thousands."""
        masked = self.without_values("\n".join(strings), True, "]").split("\n")
        if len(masked) == len(strings):
            return masked
        return [self.without_values(one, True, "]") for one in strings]  # one goes over several

    def restore_string(self, spelled, is_json, masks):
        """Restores what stands between the quotes of a string."""
        if not is_json and "[[" not in spelled and "\\u005" not in spelled:
            return spelled
        text = shown = read_string(spelled)
        if is_json and masks:
            shown = self.without_values(text, True, "")
        shown = self.with_values(shown, is_json or MAY_BE_JSON.match(text))
        return spelled if shown == text else spell_string(shown)[1:-1]


def rest_of_event(value: Any, way: Way, texts: Collection[str]) -> JsonObject:
    """Returns the payload of an event with a value, and nothing else of what the one said that had
    it, of which clients add up the strings of deltas; `texts` are the keys of texts."""
    keys = [key for _, key in way]
    for depth in reversed(range(len(keys))):
        holder = way[depth][0]
        if type(holder) is list:
            value = [value]
            continue
        dropped = (str, list, dict) if "delta" in keys[:depth] else dict
        facts = {key: [] if type(one) is list else one for key, one in holder.items()
                 if key == "type" or not (isinstance(one, dropped) or key in texts)}
        value = {**facts, keys[depth]: value}
    return value


STRING = rb'"[^"\\]*(?:\\.[^"\\]*)*"'
# A key and a value of JSON that may be another one in the next event
FACT = re.compile(rb'"([^"\\]*)"\s*:\s*(%b|[0-9][0-9.]*)' % STRING)
USUAL_TEXT = b"(%b)" % STRING


def usual_event(event: bytes, key: str, fixed: Collection[str]) -> Optional["re.Pattern[bytes]"]:
    """Returns an expression for events that say the same as one does, but for the text at a key,
    which is its group, and for ids, times and counts; None where there is none that is sure. At
    the keys `fixed` stands what is the same."""
    pieces = []
    last = 0
    for fact in FACT.finditer(event):
        name = fact[1].decode("latin-1")
        is_text = fact[2][:1] == b'"'
        if is_text and name == key and fact[2] != b'""':
            other = USUAL_TEXT
        elif name in fixed or (is_text and is_words(name, "")):
            continue
        else:
            other = rb'"[^"\\]+"' if is_text else b"[0-9][0-9.]*"
        pieces += re.escape(event[last:fact.start(2)]), other
        last = fact.end(2)
    if pieces.count(USUAL_TEXT) != 1:
        return None
    return re.compile(b"".join((*pieces, re.escape(event[last:]))))


OTHER_BRACKET = bytes.maketrans(b"{}[]", b"}{][")
EVENT_HEAD = re.compile(rb"\A(?:(?:event|id): ?[\w.-]{0,64}\r?\n)*data:")


def what_closes(plain: bytes) -> bytes:
    """Returns the quote and the brackets that end JSON which is cut off and has no escapes."""
    ends = []
    for step in JSON_STEP.finditer(plain):
        if step[0] in b"{[":
            ends.append(step[0].translate(OTHER_BRACKET))
        elif step[0] in b"]}":
            del ends[-1:]
    return b"".join((b'"' * (plain.count(b'"') % 2), *reversed(ends)))


SPELLED_OTHERWISE = re.compile(r'["\\\x00-\x1f]')


class FinalText(str):
    """Text that is final: no more is looked for in it, because values were put back there."""


def is_beside(block: Block, other: Block) -> bool:
    """Returns whether two blocks of text belong to one message and are not two in a list, of which
    one has ended when the other begins."""
    numbers = [[one for one in names if type(one) is not str] for names in (block, other)]
    return block != other and all(map(operator.eq, *numbers))


class Unmasking(Edit):
    """Puts values back in the events of a stream, though placeholders may be split over several,
    and in JSON that comes whole. An event in which nothing changes stays as it is."""
    MAX_SLICE = MAX_HELD = 1 << 13  # bytes of JSON in which all words are looked at, at once
    MARKS = b"[[", b'["', b"\\u005"  # a bracket may be the last of a text
    MAX_BLOCKS = 64       # blocks that wait at once, each with an event of a read's size
    MAX_USUAL = 1 << 12   # bytes of an example of the usual event
    left_to_learn = 4     # examples; to learn one takes half a millisecond
    # An escape, or a character, of which the rest is to come
    BEGUN_ESCAPE = re.compile(
        r"(?<!\\)(?:\\\\)*(\\(?:u[0-9a-fA-F]{0,3})?|[\udc80-\udcff]{1,3})\Z")
    IN_NO_STRING = b"\xef\xbb\xbf \t\r\n,:[]{}0123456789+-.truefalsEnNIity"  # characters of JSON
    sliced = False        # a slice of the event was passed on
    is_text = False       # a slice of it was no JSON
    opened = b""          # brackets that slices have opened, to stand before the rest
    MAX_OPENED = 1000     # bytes: nobody reads what is deeper
    prefix = b""          # of a slice that begins in a string: its quote, or a key and JSON
    depth = 0             # of the probabilities in which a slice begins
    head = b""            # of the event, up to the text that goes on in the next slice

    def __init__(self, dialect: Dialect, events: Optional[EventFraming], restorer: Restorer):
        """`events` is None where the response is no stream."""
        self.dialect = dialect
        self.events = events
        self.restorer = restorer
        # Values may be spelled otherwise in JSON, as which a text begins.
        self.reads_all = restorer.redactor or SPELLED_OTHERWISE.search(
            "".join(restorer.masks.values.values()))
        # The ends of texts that may become a placeholder: they wait for the next piece, and go on
        # with it or at the block's end; and the last events that had text of these blocks
        self.blocks: Dict[Block, Tuple[str, bytes]] = {}
        # How most events are spelled, and of what they have text, as in the streams before
        known = restorer.redactor.usual if restorer.redactor and events else {}
        self.usual, self.usual_block = known.get(dialect, (None, ()))
        # {block: (whether its text is JSON, None while that is open; what is open in it)}
        self.json = {}

    def find(self, data: bytes) -> int:
        if self.blocks or self.reads_all or self.sliced:
            return 0
        size = len(data)
        return min([data.find(mark) % (size + 1) for mark in self.MARKS])  # -1 is the end then

    def apply(self, event: bytes) -> bytes:
        match = self.usual and self.usual.fullmatch(event)
        if not match or len(self.blocks) > (self.usual_block in self.blocks):
            return self.apply_any(event)
        start, end = match.span(1)
        came = read_string(event[start + 1:end - 1].decode("utf-8", "replace"))
        goes = self.feed(self.usual_block, came, event)
        if goes == came:
            return event
        return b"".join((event[:start], spell_string(goes).encode(), event[end:]))

    def apply_any(self, event):
        if self.sliced:
            goes = self.apply_slice(self.hold_end(event[len(self.opened):]), b"")
            self.sliced = self.is_text = False
            self.opened = self.head = b""
            return goes
        self.depth = 0
        event = self.without_logprobs(event)
        payload = self.payload(event)
        return self.apply_object(event, payload) if payload else self.apply_other(event)

    def apply_object(self, event, payload):
        texts = list(self.dialect.texts(payload)) if self.events else ()
        before = [self.let_go(block) for block in list(self.blocks)
                  if self.has_ended(block, payload, texts)]
        changed = [self.put(block, way, payload, event) for block, way in texts]
        if self.restorer.redactor:
            changed.append(self.mask_rest(payload))
            masked = self.mask_lines(event)
            if len(texts) == 1 and not changed[-1] and masked == event:
                self.learn(event, payload, *texts[0])
            event = masked
        if True in changed:
            data = to_json_bytes(payload)
            event = self.events.replaced(event, data) if self.events else data
        return b"".join((*before, self.restorer.restore_json(event)))

    def apply_other(self, event):
        """Handles an event without an object: its text, if it is no JSON."""
        data = self.data(event)
        if data == LAST_DATA:
            return self.end() + event
        restorer = self.restorer
        may_be_json = data[:1] in b'{["' or not self.events
        if may_be_json and (not restorer.redactor or is_whole_json(data)):
            return restorer.restore_json(event, True)
        if restorer.redactor and data:
            return self.apply_opaque(event, may_be_json)
        return restorer.restore_text(event, may_be_json)

    def apply_opaque(self, event, may_be_json=False):
        """Handles what cannot be read, or a part of it."""
        masks = self.restorer.masks
        masks.counts["opaque"] += not self.is_text
        self.is_text = self.sliced
        return b"" if masks.opaque == "refuse" else self.restorer.restore_text(event, may_be_json)

    def mask_lines(self, event):
        """Masks what stands in an event beside its JSON."""
        if not self.events:
            return event
        return b"".join([line if self.events.data(line) is not None else
                         self.restorer.restore_text(line)
                         for line in event.splitlines(keepends=True)])

    def slice(self, data: bytes) -> Tuple[bytes, bytes]:
        if len(data) <= self.MAX_SLICE:
            return b"", data
        before = len(self.opened)
        end, prefix = self.end_of_slice(data[before:])
        end += before
        begins = self.events and not self.sliced
        self.sliced = True
        goes = (self.begin_event if begins else self.apply_slice)(data[before:end], prefix)
        if type(self.events) is ArrayFraming:  # it cuts only what begins with an object
            closing = what_closes(without_escapes(data[:end]))
            self.opened = closing[:self.MAX_OPENED].translate(OTHER_BRACKET)[::-1]
        return goes, self.opened + data[end:]

    def begin_event(self, event, prefix):
        """Handles the first slice of an event, which nearly always ends within a string."""
        shown = self.without_logprobs(event)
        ends = what_closes(without_escapes(self.data(shown)))
        payload = self.payload(shown + ends)
        if payload:
            self.prefix = prefix
            if ends.startswith(b'"'):
                self.head = shown[:without_escapes(shown).rfind(b'"') + 1]
            shown = self.apply_object(shown + ends, payload).rstrip(b"\r\n")
            shown = shown[:len(shown) - len(ends)]
        else:
            self.depth = 0
            shown = self.apply_slice(event, prefix)
        # What waits may go on in the next slice, unless that goes on with another text.
        return shown if self.head else self.end() + shown

    def hold_end(self, data):
        """Holds back the end of the text in which the first slice of an event ended, as it may go
        on in the next one; returns the rest of the last slice."""
        end = without_escapes(data).find(b'"')
        event = self.head + b"\\u0000" + data[end:]
        payload = self.payload(event)
        for block, (*_, (holder, key)) in self.dialect.texts(payload):
            if holder[key] == "\0" and not self.dialect.ends_block(payload, block):
                text = data[:end].decode("utf-8", "surrogateescape")
                said = self.settled(text)
                if said != text:
                    self.blocks[block] = read_string(text[len(said):]), event
                return said.encode("utf-8", "surrogateescape") + data[end:]
        return data

    def end_of_slice(self, data):
        """Returns where a slice ends, in which no value goes on, and the prefix of the next one."""
        before = len(self.prefix)
        data = self.prefix + data
        plain = without_escapes(data)
        start = plain.rfind(b'"') + 1
        text = data[start:].decode("utf-8", "surrogateescape")
        is_open = plain.count(b'"') % 2 or not start
        said = self.settled(text) if is_open else ""
        quote = start - 1 if is_open else plain.rfind(b'"', 0, start - 1)  # of the last string
        key = self.restorer.BEFORE_JSON.search(data, quote - 63, quote + 1)
        begin = key.start() if key else quote
        if start > before and not said:
            return (begin if begin > before else start - bool(is_open)) - before, b""
        end = start + len(said.encode("utf-8", "surrogateescape")) - before
        if end <= 0:
            return 0, self.prefix
        if key or (
                start > before and MAY_BE_JSON.match(text[:99].replace("\\", ""))):
            return end, self.prefix_of_json(said)
        return end, b'",' if start else b""  # a comma: what goes on does not begin JSON

    def settled(self, text):
        """Returns what of a text cannot become something else with what follows, as it is spelled
        in JSON."""
        said = text[:self.restorer.waiting(text)]
        escape = self.BEGUN_ESCAPE.search(said)
        return said[:escape.start(1)] if escape else said

    def prefix_of_json(self, spelled):
        """Returns that of a slice that begins in a string that is JSON, of which so much passed."""
        opened = json_before(read_string(spelled))
        return b'"%b":%b' % (JSON_TEXTS[0].encode(), spell_string(opened)[:-1].encode())

    def apply_slice(self, data, prefix):
        """Handles a slice of JSON; `prefix` is that of the next one."""
        before, self.prefix = self.prefix, prefix
        if b'"' in without_escapes(data):
            self.head = b""
        begin = 0 if self.depth else len(before)
        shown = before + data
        if self.restorer.redactor:
            said = b"".join(without_escapes(shown).split(b'"')[::2])
            said = EVENT_HEAD.sub(b"", said, 1)
            if self.is_text or said.translate(None, self.IN_NO_STRING):
                return self.apply_opaque(data)
            shown = self.without_logprobs(shown)
        return self.restorer.restore_json(shown, True)[begin:]

    def without_logprobs(self, data):
        """Returns an event, or a slice, without probabilities of tokens, which tell what is masked;
        those of a slice may go on in the next one."""
        if not self.restorer.redactor:
            return data
        plain = without_escapes(data)
        pieces = []
        last = self.end_of_logprobs(plain, 0)
        for match in self.dialect.LOGPROBS.finditer(plain):
            if match.start() >= last:
                pieces += data[last:match.end(1)], b"[]" if match[2] == b"[" else b"null"
                self.depth = 1
                last = self.end_of_logprobs(plain, match.end(2))
        return b"".join((*pieces, data[last:]))

    def end_of_logprobs(self, plain, start):
        """Returns the end of those that are open, or of the slice."""
        if not self.depth:
            return start
        for step in JSON_STEP.finditer(plain, start):
            self.depth += (step[0] in b"[{") - (step[0] in b"]}")
            if not self.depth:
                return step.end()
        return len(plain)

    def data(self, event):
        return (self.events.all_data(event) if self.events else event).strip()

    def payload(self, event):
        data = self.data(event)
        return object_in(data) if data.startswith(b"{") else {}

    def mask_rest(self, payload):
        """Masks what an event says beside its texts; returns whether it is another."""
        changed = False
        for words in words_in(payload):
            # Numbers of an object for a tool are not in its strings.
            before = "]" if words.kind == "argument" else ""
            text = self.restorer.restore(words.text, words.is_json(), before)
            if text != words.text:
                changed = True
                words.put(text)
        return changed

    def has_ended(self, block, payload, texts):
        """Returns whether an event has no place for the rest of a block that has ended."""
        if block in [other for other, _ in texts]:
            return False
        return self.dialect.ends_block(payload, block) or any(
            [is_beside(block, other) and holder[key] for other, (*_, (holder, key)) in texts])

    def learn(self, event, payload, block, way):
        """Makes an event the example of the usual one."""
        if self.left_to_learn and len(event) <= self.MAX_USUAL and not self.dialect.ends_block(
                payload, block):
            self.left_to_learn -= 1
            usual = usual_event(event, way[-1][1], self.dialect.block_keys())
            if usual:
                self.usual, self.usual_block = known = usual, block
                self.restorer.redactor.usual[self.dialect] = known

    def put(self, block, way, payload, event):
        """Puts the text to pass on into its event; returns whether the event has changed."""
        holder, key = way[-1]
        came = holder[key]
        is_end = self.sliced or self.dialect.ends_block(payload, block)
        holder[key] = FinalText(self.feed(block, came, event, is_end))
        return holder[key] != came

    def feed(self, block, came, event, is_end=False):
        """Returns what goes on of a text in an event that has more of it: all of it at the end of
        the block."""
        held = self.blocks.pop(block, ("", b""))[0]
        text = held + came
        is_end = is_end or len(self.blocks) >= self.MAX_BLOCKS
        begin = len(text) if is_end else self.restorer.waiting(text)
        if begin < len(text):
            self.blocks[block] = text[begin:], event
        return self.restored(block, text, text[:begin])

    def restored(self, block, text, goes):
        """Returns what goes on of a text, with values: spelled as in JSON where its API says that
        it is such, or where it begins so."""
        is_json, before = self.json.get(block, (None, ""))
        if is_json is None and text.strip(BEFORE_JSON):
            is_json = self.dialect.is_json_text(block) or bool(MAY_BE_JSON.match(text))
        if block in self.json or len(self.json) < self.MAX_BLOCKS:
            after = before if is_json is False else json_before(before + goes)
            self.json[block] = is_json, after
        return self.restorer.restore(goes, is_json, before)

    def let_go(self, block):
        """Returns an event with the rest of a block, as that has ended."""
        held, event = self.blocks.pop(block)
        rest = self.restored(block, held, held)
        for other, way in self.dialect.texts(self.events.payload(event)):
            if other == block:
                return self.events.again(event, to_json_bytes(
                    rest_of_event(rest, way, self.dialect.TEXT_KEYS)))
        return b""

    def end(self) -> bytes:
        return b"".join(map(self.let_go, list(self.blocks)))


# --------------------------------------------------------------------------------------------------
# Wire: HTTP/1.1 in bytes, strict, one parser for both sides (RFC 9110, RFC 9112). Heads are taken
# whole or not at all; bodies are followed through their framing. Nothing here reads a socket or
# knows what an LLM is.
# --------------------------------------------------------------------------------------------------

MAX_HEAD = 65536        # bytes of one head
MAX_START_LINE = 8192   # bytes of its first line
MAX_LONG_LINE = 32768   # bytes of a line of LONG_FIELDS: other servers' tokens and cookies
MAX_CHUNK_LINE = 1024   # bytes of a chunk's size and extensions
MAX_TRAILERS = 8192     # bytes of fields after the last chunk; they are read and dropped

TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
REQUEST_LINE = re.compile(r"([A-Z][A-Z_-]{0,31}) ([!-~]+) HTTP/1\.([01])")
ABSOLUTE_FORM = re.compile(r"https?://([^/?#@]+)(?![^/?])/?([!\"$-~]*)", re.IGNORECASE)
STATUS_LINE = re.compile(r"HTTP/1\.([01]) ([1-9][0-9]{2})(?: ([\t -~\x80-\xff]*))?")
FIELD_LINES = re.compile(r"(?:%s:[\t -~\x80-\xff]*\r\n)*" % TOKEN)
HEAD_START = re.compile(rb"[A-Z\r]")  # of a head, or of an empty line before it
EMPTY_LINES = re.compile(rb"\A(?:\r\n){1,8}")  # so many are skipped before a head
BARE_LINE_END = re.compile(rb"(?:[^\r]|^)\n|\r[^\n]")
HOST = re.compile(r"(?:[A-Za-z0-9._~!$&'()*+,;=%-]*|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?")
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:[ \t]*;[\t -~\x80-\xff]*)?\r\n")
CHUNK_LINE_START = re.compile(
    rb"[0-9A-Fa-f]{0,16}(?:(?<=[0-9A-Fa-f])[ \t]*(?:;[\t -~\x80-\xff]*)?)?\r?")
TRAILERS = re.compile((FIELD_LINES.pattern + r"\r\n").encode("latin-1"))
LAST_CHUNK = b"0\r\n\r\n"

# RFC 9110 7.6.1: they speak of one connection, not of the message.
HOP_BY_HOP = set_of("""
    close connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer
    transfer-encoding upgrade""")
LONG_FIELDS = frozenset(CREDENTIAL_FIELDS).union(["cookie"])
# A second one would leave the choice to whoever reads it next.
SINGLE = frozenset(
    "host content-length transfer-encoding authorization x-api-key expect".split())


class Head:
    """A start line and header fields. `lines` maps a lower-case name to the field's line as it
    came; lines of the same name are joined by their line end. `options` are those of Connection.
    `cache` keeps what others derive from this head alone, because heads repeat on a connection.
    `close_after`: the connection cannot carry another message after this one."""
    __slots__ = "data start lines options around_length cache chunked length close_after".split()
    MAX_LINE = MAX_HEAD  # bytes of a field's line
    MAX_FIELDS = 500

    def __init__(self, data: bytes):
        """`data` runs from the start line through the blank line. Raises Malformed."""
        self.data = data
        self.around_length = split_at_length(data)
        self.cache = {}
        self.start, _, block = data[:-2].decode("latin-1").partition("\r\n")
        if not FIELD_LINES.fullmatch(block):
            raise Malformed
        lines = block.split("\r\n")
        lines.pop()
        if len(self.start) > MAX_START_LINE:
            raise HeadTooLarge(status=414)
        if len(lines) > self.MAX_FIELDS:
            raise HeadTooLarge(status=431)
        self.lines = {}
        for line in lines:
            name = line[:line.index(":")].lower()
            if len(line) > self.MAX_LINE and (
                    len(line) > MAX_LONG_LINE or name not in LONG_FIELDS):
                raise HeadTooLarge(status=431)
            if name in self.lines:
                if name in SINGLE:
                    raise Malformed
                line = self.lines[name] + "\r\n" + line
            self.lines[name] = line
        options = self.get("connection", "").lower().split(",")
        self.options = [option.strip(" \t") for option in options]

    @classmethod
    def read(cls, data: bytes, last: Optional["Head"]) -> "Head":
        """Returns `last` again, with its new length, where `data` differs from it in nothing else.

        Both sides send the same head again and again, but for the length: what was checked once
        need not be checked again. The length stands in the same place, because one more beside
        another framing would be a door for smuggling."""
        if not last:
            return cls(data)
        if last.data == data:
            return last
        before, behind = last.around_length
        length = data[len(before):-len(behind)]  # nothing, where that head has no length
        if not (length.isdigit() and len(length) < 16
                and data.startswith(before) and data.endswith(behind)):
            return cls(data)
        last.data = data
        last.length = int(length)
        return last

    def __contains__(self, name: str) -> bool:
        return name in self.lines

    def get(self, name: str, default: Optional[str] = None) -> Optional[str]:
        """Returns the value of a field; repeated ones are joined by ", " (RFC 9110 5.3)."""
        line = self.lines.get(name)
        if line is None:
            return default
        if "\r\n" in line:
            return ", ".join([one.partition(":")[2].strip(" \t") for one in line.split("\r\n")])
        return line.partition(":")[2].strip(" \t")

    def end_to_end(self, without: FrozenSet[str]) -> List[str]:
        """Returns the lines to pass on: none of this connection's, none it names, none
        `without`."""
        without = without.union(self.options)
        return [line for name, line in self.lines.items() if name not in without]

    def read_framing(self, version):
        """Reads the framing of a message (RFC 9112 6.3). Two kinds of framing at once, or a coding
        that is not exactly chunked, would be a door for smuggling. A length is 1*DIGIT (RFC 9110
        8.6), and no more digits than make sense."""
        text = self.get("content-length")
        coding = self.get("transfer-encoding")
        self.length = None
        self.chunked = coding is not None
        self.close_after = not version or "close" in self.options
        if text is not None:
            if len(text) > 15 or not text.isdecimal():  # isdigit takes superscripts
                raise Malformed
            self.length = int(text)
        if self.chunked:
            if text is not None or not version:
                raise Malformed
            if coding.lower() != "chunked":
                raise Malformed("Only the chunked transfer coding is understood", status=501)


def split_at_length(data):
    """Returns the parts of a head before and after its length; all and nothing without one in the
    usual spelling."""
    start = max(data.find(b"\r\nContent-Length: "), data.find(b"\r\ncontent-length: ")) + 18
    end = data.find(b"\r\n", start)
    if start > 18 and data[start:end].isdigit():
        return data[:start], data[end:]
    return data, b""


class HeadScanner:
    """Looks at a head that comes in pieces, and refuses at once what can no longer become one that
    begins with `start_line`."""
    __slots__ = ("start_line", "checked", "scanned")

    def __init__(self, start_line: "re.Pattern[str]"):
        self.start_line = start_line
        self.checked = 0  # bytes of whole lines that were judged
        self.scanned = 0  # bytes that were looked at

    def check(self, data: bytes):
        """Looks at all that has come, which is not a whole head. Raises Malformed, HeadTooLarge."""
        line_end = data.rfind(b"\r\n", max(self.checked, self.scanned - 1))
        if len(data) > MAX_HEAD or (not self.checked and line_end < 0
                                    and len(data) > MAX_START_LINE):
            raise HeadTooLarge(status=431 if self.checked else 414)
        if (not HEAD_START.match(data)
                or BARE_LINE_END.search(data, max(0, self.scanned - 1))):
            raise Malformed
        self.scanned = len(data)
        if line_end < 0:
            return
        fields = data[self.checked:line_end + 2].decode("latin-1")
        if not self.checked:
            start, _, fields = fields.partition("\r\n")
            if not self.start_line.fullmatch(start):
                raise Malformed
        if not FIELD_LINES.fullmatch(fields):
            raise Malformed
        self.checked = line_end + 2


class Request(Head):
    """A request head that every RFC 9112 reader would read the same way. `path` and `query` come
    from its target; `length` is None for a chunked body; `sized`: nothing is said of the body but
    its length."""
    __slots__ = ("method", "path", "query", "version", "sized")
    MAX_LINE = 8192
    MAX_FIELDS = 100

    def __init__(self, data: bytes):
        super().__init__(data)
        match = REQUEST_LINE.fullmatch(self.start)
        if not match:
            other_version = re.fullmatch(r"[A-Z]+ [!-~]+ HTTP/(?!1\.[01])[0-9]\.[0-9]", self.start)
            raise Malformed(status=505 if other_version else 400)
        self.method = match[1]
        self.version = int(match[3])
        host = self.get("host")
        if (host is None and self.version) or not HOST.fullmatch(host or ""):
            raise Malformed
        target = match[2]
        if target[0] != "/" or "#" in target:
            target = self.origin_form(target, host)
        self.path, _, self.query = target.partition("?")
        self.read_framing(self.version)
        if not self.chunked:
            self.length = self.length or 0
        self.sized = not self.chunked and (
            "expect" not in self.lines and "content-encoding" not in self.lines)

    def origin_form(self, target, host):
        """Reads RFC 9112 3.2. The absolute form is taken when it names the Host; nothing in it ever
        chooses where a call goes."""
        match = ABSOLUTE_FORM.fullmatch(target)
        if match and match[1].lower() == (host or "").lower():
            return "/" + match[2]
        if target == "*" and self.method == "OPTIONS":
            return target
        raise Malformed(status=501 if self.method == "CONNECT" else 400)


class ResponseHead(Head):
    """The head of a response, checked. `length` is None where it is not said."""
    __slots__ = ("status", "reason")

    def __init__(self, data: bytes):
        super().__init__(data)
        match = STATUS_LINE.fullmatch(self.start)
        if not match:
            raise Malformed
        self.status = int(match[2])
        self.reason = match[3] or ""
        self.read_framing(match[1] == "1")


class Sized:
    """Framing by Content-Length. `feed` returns (what can be passed on as it is, the payload in
    it); `trailing` is what came after the end."""
    __slots__ = ("remaining", "ended", "trailing")

    def __init__(self, length: int):
        self.remaining = length
        self.ended = length == 0
        self.trailing = b""

    def feed(self, data: bytes) -> Tuple[bytes, bytes]:
        if len(data) > self.remaining:
            self.trailing = data[self.remaining:]
            data = data[:self.remaining]
        self.remaining -= len(data)
        self.ended = not self.remaining
        return data, data

    def end_of_stream(self) -> bool:
        """Returns whether the body is complete, now that the sender has closed."""
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
    """Framing by chunks (RFC 9112 7.1). What `feed` passes on ends at the last byte that was
    checked, so nothing malformed ever goes through; trailers are dropped, and the last chunk is
    passed on only when the sender's has come."""
    __slots__ = ("remaining", "ended", "trailing", "held")

    def __init__(self):
        self.remaining = 0  # bytes of the chunk that is open, with its line end
        self.ended = False
        self.trailing = b""
        self.held = b""     # a size line, or trailers, that are not whole

    def feed(self, data: bytes) -> Tuple[bytes, bytes]:
        if self.held:
            data = self.held + data
            self.held = b""
        elif not self.remaining and data.endswith(b"\r\n"):  # one whole chunk, as nearly always
            match = CHUNK_LINE.match(data)
            if match and 2 < int(match[1], 16) + 2 == len(data) - match.end():
                return data, data[match.end():-2]
        return self.feed_any(data)

    def feed_any(self, data):
        position = 0
        size = len(data)
        payload = b""
        remaining = self.remaining
        while position < size:
            if not remaining:
                match = CHUNK_LINE.match(data, position)
                if not match:  # no size line yet, and refused where it can no longer become one
                    if (size - position > MAX_CHUNK_LINE
                            or not CHUNK_LINE_START.fullmatch(data, position)):
                        raise Malformed
                    break
                remaining = int(match[1], 16)
                if not remaining:
                    return self.feed_last(data, position, match.end(), payload)
                position = match.end()
                remaining += 2
            # The whole chunk, or its beginning.
            end = min(position + remaining - 2, size)
            payload = payload + data[position:end] if payload else data[position:end]
            remaining -= end - position
            position = end
            if remaining > 2:
                break
            line_end = data[position:position + 2]
            if line_end != b"\r\n":
                if not b"\r\n".startswith(line_end):
                    raise Malformed
                break
            position += 2
            remaining = 0
        self.remaining = remaining
        self.held = data[position:]
        return data[:position], payload

    def feed_last(self, data, position, end, payload):
        self.remaining = 0
        match = TRAILERS.match(data, end)
        if match:
            self.ended = True
            self.trailing = data[match.end():]
            return data[:position] + LAST_CHUNK, payload
        is_whole = data.find(b"\r\n\r\n", end) >= 0
        if is_whole or len(data) - end > MAX_TRAILERS or BARE_LINE_END.search(data, end - 1):
            raise Malformed
        self.held = data[position:]
        return data[:position], payload

    def end_of_stream(self) -> bool:
        return self.ended


Framing = Union[Sized, Chunked]


def encode_chunk(payload: bytes, is_last: bool = False) -> bytes:
    chunk = b"%x\r\n%b\r\n" % (len(payload), payload) if payload else b""
    return chunk + LAST_CHUNK if is_last else chunk


AS_IS, PAYLOAD, CHUNKED = range(3)  # styles of a BodyAdapter


class BodyAdapter:
    """A body on its way from one side's framing to the other's: `feed` turns what came into what
    goes out. AS_IS passes the sender's bytes, PAYLOAD that alone, CHUNKED the payload in
    chunks of ours. `readers` are fed the payload, one after the other, and return what of it goes
    on where the style is not AS_IS. With `events`, something can be inserted between two of them.
    A `secret` becomes stars where it comes in one piece, as in what upstreams say of a key."""
    __slots__ = ("framing", "style", "readers", "events", "passed", "tail", "secret")

    def __init__(self, framing: Framing, style: int = AS_IS,
                 readers: Sequence[Union[UsageReader, Editor]] = (),
                 events: Optional[EventFraming] = None):
        self.framing = framing
        self.style = style
        self.readers = readers
        self.events = events
        self.passed = 0  # bytes of payload
        self.tail = b""  # the last bytes of it, where something may be inserted
        self.secret = b""

    def feed(self, data: bytes) -> bytes:
        """Raises Malformed as soon as the framing is broken."""
        secret = self.secret
        if secret and data.find(secret) >= 0:  # `in` takes twice as long
            data = data.replace(secret, b"*" * len(secret))
        out, payload = self.framing.feed(data)
        if payload:
            for reader in self.readers:
                payload = reader.feed(payload)
        if self.style != AS_IS:
            ended = self.framing.ended
            if ended:
                payload += flush_all(self.readers)
            out = encode_chunk(payload, ended) if self.style == CHUNKED else payload
        self.passed += len(payload)
        if self.events:
            self.tail = (self.tail + payload)[-4:]
        return out

    def insert(self, event: bytes) -> bytes:
        """Returns `event` as it can be inserted here, between two events and two chunks; nothing
        elsewhere."""
        in_chunk = self.style == AS_IS and self.framing.remaining
        if in_chunk or not self.events or not self.events.at_boundary(self.tail):
            return b""
        self.passed += len(event)
        return event if self.style == PAYLOAD else encode_chunk(event)

    def end_of_stream(self, reset: bool = False) -> Tuple[bool, bytes]:
        """Returns (whether the sender has closed at a proper end, what is left to send)."""
        whole = not reset and self.framing.end_of_stream()
        payload = flush_all(self.readers)
        self.passed += len(payload)
        self.tail = (self.tail + payload)[-4:]
        return whole, encode_chunk(payload, whole) if self.style == CHUNKED else payload


# --------------------------------------------------------------------------------------------------
# Streams: the sockets of both sides on the event loop. A Context carries the deadline of a call and
# the leaving of its client into every await; a Stream reads and writes one socket, plain or TLS
# alike; a Transfer carries a body by callbacks, so that no coroutine is woken for an event. They
# know no LLMs and no buckets.
# --------------------------------------------------------------------------------------------------

# Bytes to read at once: PyPy pays for what it could have read, and of a TLS record, which holds no
# more, nothing stays inside OpenSSL, where it would make no descriptor ready.
BLOCK = 16384
MAX_READ_AHEAD = 65536  # bytes that are read of a client while its call is running
WOULD_BLOCK = (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
CAN_POLL = hasattr(select, "poll")
IS_PYPY = sys.implementation.name == "pypy"
READABLE = 1            # POLLIN, which Windows has not
HANG_UP = 0x2000        # POLLRDHUP of Linux: PyPy has no name for it


KEEP_ALIVE_OPTIONS = (  # after 60 s of silence ask every 15 s, and give up after 4
    ("TCP_KEEPIDLE", 60), ("TCP_KEEPALIVE", 60),  # the latter on macOS
    ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4))


def keep_alive(sock: socket.socket):
    """Turns TCP keep-alive on: the system notices a peer that is gone without a word, and devices
    on the way see a connection in use. Accepted sockets inherit it from the listening one."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEP_ALIVE_OPTIONS:
        with suppress(AttributeError, OSError):  # not every system has each
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def soon(loop, act: Callable[..., None], *arguments: Any):
    """Calls something on the loop, from another thread; a closed loop calls nothing."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(act, *arguments)


class Context:
    """Goes through a call, as Go's context does: every await for a peer is one of `wait`, so it
    ends at its deadline or when the call is ended, and can be seen. The timer is moved only when it
    fires, so that a wait costs none."""
    future: Optional[asyncio.Future] = None  # what is awaited
    what = "nothing"                         # the same in words
    since = 0.0                              # when the wait began
    deadline = inf                      # when the wait must end, in the loop's time
    until = inf                         # when the whole call must end
    timer = None
    timer_at = inf                      # when the timer fires
    reason: Optional[Exception] = None       # why the call was ended
    slot: Optional["Ticket"] = None          # in the queue of a busy upstream
    on_connect: Optional[Callable[[float], None]] = None  # gets the seconds of connecting
    # Which model is asked for whom, where it is of interest how such calls fare
    subject: Optional[Tuple[str, Caller]] = None

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.loop = loop

    def expired(self):
        """Tells whether the call's own deadline has passed, not just that of one wait."""
        return self.loop.time() >= self.until

    def wait(self, future: asyncio.Future, seconds: float, what: str) -> asyncio.Future:
        """Returns `future`, which is to be awaited at once. It raises TimeoutError after `seconds`,
        and what the call is ended with."""
        if self.reason:
            raise self.reason
        self.since = now = self.loop.time()
        self.deadline = deadline = now + seconds
        if deadline > self.until:
            self.deadline = deadline = self.until
        self.future = future
        self.what = what
        if deadline < self.timer_at:
            self.set_timer()
        return future

    async def sleep(self, seconds: float, what: str):
        """Waits for a time."""
        with suppress(TimeoutError):
            await self.wait(self.loop.create_future(), seconds, what)

    def set_timer(self):
        if self.timer:
            self.timer.cancel()
        self.timer_at = self.deadline
        self.timer = self.loop.call_at(self.deadline, self.on_timer)

    def on_timer(self):
        self.timer_at = inf
        if not self.is_waiting() or self.deadline == inf:
            return
        if self.loop.time() < self.deadline:
            self.set_timer()
        else:
            self.future.set_exception(TimeoutError())

    def is_waiting(self):
        return self.future is not None and not self.future.done()

    def end(self, reason: Exception):
        """Ends the call, whatever it awaits now or next."""
        if self.reason is None:
            self.reason = reason
            if self.is_waiting():
                self.future.set_exception(reason)

    def close(self):
        if self.timer:
            self.timer.cancel()
        self.future = None  # an exception in it would hold its frames
        self.on_connect = None

    def __repr__(self) -> str:
        if not self.is_waiting():
            return "running"
        limit = "" if self.deadline == inf else " of %.3gs" % (self.deadline - self.since)
        return "awaits %s for %.1fs%s" % (self.what, self.loop.time() - self.since, limit)


class StreamSelector(DefaultSelector):
    """Calls a stream whose socket is ready from within `select`, though what came before in the
    same pass may have changed what it asks for. What asyncio has registered goes to asyncio, by
    whose way each event takes a handle and a place in a queue."""

    on_bug = None  # gets what a stream's callback has raised
    looks = 0      # how often it was asked

    def select(self, timeout: Optional[float] = None) -> list:
        others = []
        self.looks += 1
        for key, events in super().select(timeout):
            stream = key.data
            if type(stream) is not Stream:
                others.append((key, events))
                continue
            try:
                if events & EVENT_READ and stream.reading:
                    stream.on_readable()  # first: of a connection that was reset, reading tells so
                if events & EVENT_WRITE and stream.writing:
                    stream.flush()
            except Exception as bug:
                self.on_bug(bug)
        return others


class Loop(asyncio.SelectorEventLoop):
    """asyncio's loop, with a selector that knows streams. What many calls do alike is put off to
    its next pass, and done there for all of them: the processor has the code at hand then, and a
    peer that was just woken is still awake, as waking costs more than sending."""

    def __init__(self):
        self.selector = StreamSelector()
        self.selector.on_bug = self.on_bug
        super().__init__(self.selector)
        self.ended = []   # (what writes it down, entry)
        self.posted = []  # streams that send what they have posted, after that

    def do_put_off(self):
        """Does it all. Whoever puts the first one into a list schedules this."""
        ended, posted = self.ended, self.posted
        self.ended, self.posted = [], []
        for write_down, entry in ended:
            write_down(entry)
        for stream in posted:
            try:
                stream.write(b"")
            except Exception as bug:
                self.on_bug(bug)

    def on_bug(self, bug: Exception):
        """Tells of a bug of ours in a stream's callback: others go on."""
        self.call_exception_handler({"message": "a stream", "exception": bug})


def run_alone(work: Awaitable) -> Any:
    """Runs a coroutine as asyncio.run does, on a loop that knows streams."""
    with closing(Loop()) as loop:
        try:
            return loop.run_until_complete(work)
        finally:
            while tasks := asyncio.all_tasks(loop):
                for task in tasks:
                    task.cancel()
                # What each of them was ended by is nobody's business.
                loop.run_until_complete(asyncio.wait(tasks))


class Stream:
    """One side's socket on the loop. `read_buffer` holds what came and nobody has taken yet;
    `sink`, where there is one, is given what comes instead. `ended`: nothing more will come,
    because of `failure` where it is set."""
    failure: Optional[OSError] = None
    wrote_at = 0.0  # when a slow peer last took bytes
    unsent = b""    # bytes that were dropped when writing failed
    write_waiter: Optional[asyncio.Future] = None  # a task awaits that bytes were sent
    source: Optional["Stream"] = None      # the stream to pause while this one is slow
    poller = None   # tells whether there is something to read
    idle_since = 0  # the loop's last look before it was idle
    MOST_POSTED = 4096  # bytes that an idle socket always takes
    # Callbacks. `on_full`: so much was read ahead that reading was paused.
    on_end = on_full = on_write_failed = None

    def __init__(self, loop: Loop, sock: socket.socket):
        sock.setblocking(False)
        self.loop = loop
        self.sock = sock
        self.descriptor = sock.fileno()
        self.encrypted = isinstance(sock, ssl.SSLSocket)
        self.read_buffer = b""
        self.write_buffer = bytearray()
        # What is read for every call is not left to the class: CPython would look there last.
        self.reading = self.writing = False  # what the loop is asked to tell of
        self.events = 0                      # the same as the selector knows it
        self.ended = False
        self.posted = b""                    # bytes to send in the loop's next pass
        self.write_failed = False            # from now on writes are dropped
        self.discarding = False              # input is dropped: the rest of a refused body
        self.waiter = None                   # a task awaits more input
        self.sink = None                     # callback: gets the input instead of the buffer

    def __repr__(self) -> str:
        state = "failed" if self.failure else "ended" if self.ended else "open"
        return "<Stream %d %s unread=%d unsent=%d>" % (
            self.descriptor, state, len(self.read_buffer), len(self.write_buffer))

    # -- what the loop tells

    def watch(self):
        """Has the loop tell of what is asked for now."""
        events = EVENT_READ * self.reading | EVENT_WRITE * self.writing
        selector = self.loop.selector
        if not self.events:
            selector.register(self.descriptor, events, self)
        elif events:
            selector.modify(self.descriptor, events, self)
        else:
            selector.unregister(self.descriptor)
        self.events = events

    # -- what comes

    def resume_reading(self):
        if not self.reading and not self.ended:
            self.reading = True
            self.watch()

    def pause_reading(self):
        if self.reading:
            self.reading = False
            self.watch()

    def on_readable(self):
        sock = self.sock
        try:  # `recv` of TLS comes to `read` by two more calls
            data = sock.read(BLOCK) if self.encrypted else sock.recv(BLOCK)
        except WOULD_BLOCK:
            if self.encrypted:
                self.wake(self.waiter)  # a part of a record: something has begun to come
            return
        except OSError as failure:
            return self.end(failure)
        if self.write_buffer and not self.writing:
            self.flush()  # TLS had to read before it could write
        if not data:
            self.end()
        elif self.sink:
            self.sink(data)
        else:
            if not self.discarding:
                self.read_buffer += data
            waiter = self.waiter
            if waiter and not waiter.done():
                waiter.set_result(True)
            elif len(self.read_buffer) >= MAX_READ_AHEAD:
                self.pause_reading()
                if self.on_full:
                    self.on_full()

    def end(self, failure=None):
        """Notes that nothing more will come."""
        if not self.ended:
            self.ended = True
            self.failure = failure
            self.forget_failures()
            self.pause_reading()
            if not self.tell_end() and self.on_end:
                self.on_end()

    def tell_end(self):
        """Returns whether somebody was waiting for more."""
        if self.failure and self.waiter and not self.waiter.done():
            self.waiter.set_exception(self.failure)
            return True
        return self.wake(self.waiter, False)

    @staticmethod
    def wake(waiter, result=True):
        """Returns whether somebody was waiting."""
        if waiter is None or waiter.done():
            return False
        waiter.set_result(result)
        return True

    def more(self, context: Context, seconds: float, what: str) -> asyncio.Future:
        """Waits until more has come; the result is False at the end. Raises OSError, and as `wait`
        does."""
        self.waiter = context.wait(self.loop.create_future(), seconds, what)
        if self.ended:
            self.tell_end()
        elif not self.reading:
            self.resume_reading()
        return self.waiter

    async def read_head(self, start_line: "re.Pattern[str]", context: Context, seconds: float,
                        what: str) -> Optional[bytes]:
        """Returns the bytes of one head, blank line included; None if the stream ends before its
        first byte. Raises Malformed, HeadTooLarge, OSError, and as `wait` does."""
        scanner = HeadScanner(start_line)
        deadline = self.loop.time() + seconds
        while True:
            head = self.take_head()
            if head:
                return head
            if self.read_buffer:
                scanner.check(self.read_buffer)
            if not await self.more(context, deadline - self.loop.time(), what):
                if self.read_buffer:
                    raise Malformed
                return None

    def take_head(self) -> Optional[bytes]:
        """Returns the bytes of a head that has come whole, as nearly all do. Empty lines before it
        are dropped (RFC 9112 2.2)."""
        data = self.read_buffer
        if data.startswith(b"\r"):
            self.read_buffer = data = EMPTY_LINES.sub(b"", data, 1)
        end = data.find(b"\r\n\r\n") + 4
        if not 4 <= end <= MAX_HEAD:
            return None
        self.read_buffer = data[end:]
        return data[:end]

    def take_all(self) -> bytes:
        taken = self.read_buffer
        self.read_buffer = b""
        return taken

    def is_silent(self, look: bool = True) -> bool:
        """Tells whether an idle connection can be used again: neither its end came, nor bytes that
        the next call would take for its response. Without a `look` the loop's last one counts, if
        the connection was idle before that."""
        if look or not self.reading or self.idle_since == self.loop.selector.looks:
            poller = self.poller = self.poller or self.poller_for(READABLE)
            if poller is None or poller.poll(0):
                self.on_readable()
        return not self.ended and not self.read_buffer

    def has_hung_up(self):
        """Tells whether the other side closed, while nothing is read: the end stands behind what
        nobody has read yet. Windows cannot tell."""
        poller = self.poller_for(HANG_UP)
        return poller is not None and bool(poller.poll(0))

    def poller_for(self, event):
        """Returns what tells whether an event is there, None where nothing can."""
        if not CAN_POLL:
            return None
        poller = select.poll()
        poller.register(self.descriptor, event)
        return poller

    # -- what goes

    def write(self, data: bytes):
        """Sends what can be sent now, what was posted first; the rest when the peer takes it."""
        if self.posted:
            data = self.posted + data
            self.posted = b""
        if self.write_failed or not data:
            return
        if self.write_buffer:
            self.write_buffer += data
            return
        sent = 0
        if not self.encrypted or len(data) <= BLOCK:
            try:
                sent = self.sock.send(data)
            except WOULD_BLOCK:
                pass
            except OSError:
                return self.fail_writing(data)
        if sent < len(data):
            self.write_buffer += memoryview(data)[sent:]
            self.flush()

    def post(self, data: bytes):
        """Sends a few bytes in the loop's next pass, one behind the other with what other streams
        post in this one."""
        if self.posted or self.write_buffer or len(data) > self.MOST_POSTED:
            return self.write(data)
        self.posted = data
        loop = self.loop
        if not loop.posted:
            loop.call_soon(loop.do_put_off)
        loop.posted.append(self)

    def flush(self):
        """Sends block by block: a TLS record that was begun must be sent again as it was."""
        self.wrote_at = self.loop.time()
        try:
            while self.write_buffer:
                sent = self.sock.send(self.write_buffer[:BLOCK])
                del self.write_buffer[:sent]
        except ssl.SSLWantReadError:
            return  # on_readable comes here again
        except WOULD_BLOCK:
            self.wake(self.write_waiter)
            return self.wait_for_room()
        except OSError:
            return self.fail_writing()
        self.has_room()

    def fail_writing(self, data=b''):
        """Notes that the peer takes no more; it may still send."""
        self.write_failed = True
        self.forget_failures()
        self.unsent = bytes(self.write_buffer) + data
        self.write_buffer.clear()
        self.has_room()
        if self.on_write_failed:
            self.on_write_failed()

    def wait_for_room(self):
        if not self.writing:
            self.writing = True
            self.watch()
            if self.source:
                self.source.pause_reading()

    def has_room(self):
        if self.writing:
            self.writing = False
            self.watch()
            if self.source:
                self.source.resume_reading()
        self.wake(self.write_waiter)

    async def drain(self, context: Context, seconds: float, what: str,
                    or_answer: bool = False) -> bool:
        """Waits until all was sent; returns False if it cannot be, or, with `or_answer`, if the
        peer speaks first. Raises TimeoutError after `seconds` in which it took nothing."""
        if or_answer:
            self.resume_reading()
        while self.write_buffer and not (or_answer and (self.read_buffer or self.ended)):
            self.write_waiter = self.loop.create_future()
            if or_answer:
                self.waiter = self.write_waiter
            await context.wait(self.write_waiter, seconds, what)
        return not self.write_buffer and not self.write_failed

    # -- TLS

    async def handshake(self, context, seconds):
        """Does a server's part of the TLS handshake. Raises OSError, and as `wait` does."""
        deadline = self.loop.time() + seconds
        while True:
            try:
                return self.sock.do_handshake()
            except ssl.SSLWantReadError:
                add, remove = self.loop.add_reader, self.loop.remove_reader
            except ssl.SSLWantWriteError:
                add, remove = self.loop.add_writer, self.loop.remove_writer
            except OSError:
                self.forget_failures()
                raise
            ready = self.loop.create_future()
            add(self.descriptor, self.wake, ready)
            try:
                await context.wait(ready, deadline - self.loop.time(), "the TLS handshake")
            finally:
                remove(self.descriptor)

    def forget_failures(self):
        """Clears errors that one connection leaves in OpenSSL, which PyPy would raise for the next
        one, by beginning another handshake."""
        if self.encrypted and IS_PYPY:
            sock = self.sock
            sock.context.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), sock.server_side,
                                  sock.server_hostname)

    def give_up_tls(self):
        """Goes on in plain text: the handshake failed because the client speaks HTTP without
        TLS."""
        self.sock = socket.socket(fileno=self.sock.detach())
        self.encrypted = False

    # -- its end

    def shut_down_writing(self):
        """Tells the peer that nothing more will be sent."""
        self.write(b"")
        with suppress(OSError, ValueError):
            if self.encrypted:
                self.sock.unwrap()  # close_notify; nobody waits for that of the other side
                self.encrypted = False
        with suppress(OSError):
            socket.socket.shutdown(self.sock, socket.SHUT_WR)

    def reset_on_close(self):
        """Makes the close send a RST, which nobody takes for the end of a body."""
        with suppress(OSError):
            self.sock.setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def close(self):
        self.write(b"")
        # Off the loop first: else the next owner of the number is answered.
        self.pause_reading()
        self.ended = True
        self.read_buffer = b""
        self.write_buffer.clear()
        self.source = None
        self.has_room()
        self.sock.close()
        # What owns this holds no cycle with it, which only a late collection would find.
        self.on_end = self.on_full = self.on_write_failed = None


class Transfer:
    """Carries one body from `source` to `target` by callbacks, while it is entered. `done` is
    completed once with how that ended: WHOLE, MALFORMED, BROKEN_OFF (the source closed), SILENT (it
    sent nothing in time), SLOW (the target took nothing in time); a bug of ours is raised from it.
    A slow target pauses its source."""
    WHOLE, MALFORMED, BROKEN_OFF, SILENT, SLOW = "ok", "malformed", "broken off", "silent", "slow"
    SLOW_READER_SECONDS = 60

    timer = None
    comment = b""               # is put in after a pause of so many seconds,
    comment_seconds = inf  # where the adapter has room for it

    def __init__(self, source: Stream, target: Stream, adapter: BodyAdapter, seconds: float,
                 slow_seconds: Optional[float] = None):
        """`seconds` may pass between two reads, `slow_seconds` between two writes."""
        self.loop = source.loop
        self.source = source
        self.target = target
        self.adapter = adapter
        self.seconds = seconds
        self.slow_seconds = slow_seconds or self.SLOW_READER_SECONDS
        self.done = self.loop.create_future()
        self.came_at = self.commented_at = self.loop.time()

    def __repr__(self) -> str:
        return "<Transfer %r to %r passed=%d>" % (self.source, self.target, self.adapter.passed)

    def __enter__(self) -> "Transfer":
        source = self.source
        self.on_end_before = source.on_end
        source.sink = self.on_data
        source.on_end = self.on_source_end
        self.target.source = source
        self.check()
        if source.read_buffer:
            self.on_data(source.take_all())
        if source.ended:
            self.on_source_end()
        elif source.reading == self.target.writing and not self.done.done():
            (source.pause_reading if self.target.writing else source.resume_reading)()
        return self

    def __exit__(self, *_: Any):
        self.let_go()
        self.target.source = None  # the target may be slow to the end
        if self.timer:
            self.timer.cancel()
        if not self.source.reading:
            self.source.resume_reading()

    def on_data(self, data):
        """Passes bytes on. This is the hot path: one look at the framing, one write."""
        self.came_at = self.loop.time()
        adapter = self.adapter
        try:
            out = adapter.feed(data)
        except Malformed:
            return self.finish(self.MALFORMED)
        except Exception as bug:  # the awaiting task logs it, and ends the call
            return self.finish(bug)
        if out:
            self.target.write(out)
        if adapter.framing.ended:
            self.finish(self.WHOLE)

    def on_source_end(self):
        if self.done.done():
            return
        try:
            whole, out = self.adapter.end_of_stream(reset=self.source.failure is not None)
        except Exception as bug:
            return self.finish(bug)
        self.target.write(out)
        self.finish(self.WHOLE if whole else self.BROKEN_OFF)

    def let_go(self):
        """Takes the callbacks back: what the source sends from now on is no part of this body."""
        self.source.sink = None
        self.source.on_end = self.on_end_before

    def finish(self, ending):
        self.let_go()
        if not self.done.done():
            is_bug = isinstance(ending, Exception)
            (self.done.set_exception if is_bug else self.done.set_result)(ending)

    def due(self) -> float:
        """Returns when the source must have sent more."""
        return max(self.came_at, self.target.wrote_at) + self.seconds

    def check(self):
        """Checks the deadlines, again at the next one."""
        now = self.loop.time()
        if self.target.write_buffer:
            due = self.target.wrote_at + self.slow_seconds
            ending = self.SLOW
        else:
            due = self.due()
            ending = self.SILENT
        if now >= due:
            return self.finish(ending)
        comment_at = max(self.came_at, self.commented_at) + self.comment_seconds
        if now >= comment_at:
            self.commented_at = now
            comment_at = now + self.comment_seconds
            if not self.target.write_buffer:
                self.target.write(self.adapter.insert(self.comment))
        when = min(due, comment_at, now + self.slow_seconds)
        self.timer = self.loop.call_at(when, self.check)


class MemoryBudget:
    """Bytes for all bodies that are held at once, at most half of them for one owner. Small ones
    are not counted: there is one at most for each connection."""
    SMALL = 65536

    def __init__(self, size: int):
        self.free = size
        self.share = size // 2
        self.held = Counter()

    def take(self, size: int, owner: Optional[CallerKey]):
        """Reserves bytes. Raises Overloaded where there are not so many."""
        if size > min(self.free, self.share - self.held[owner]):
            raise Overloaded
        self.free -= size
        self.held[owner] += size

    def give_back(self, size: int, owner: Optional[CallerKey]):
        self.free += size
        self.held[owner] -= size
        if not self.held[owner]:
            del self.held[owner]


class Turns:
    """Lets long computations on bodies run one by one, callers taking turns. After each the loop is
    left to everybody else for as long as that took."""
    handle = None

    def __init__(self, loop: Loop):
        self.loop = loop
        self.waiting = OrderedDict()  # owner -> futures, whose turn is next first

    async def take(self, owner: Optional[CallerKey], context: Context):
        """Raises as `Context.wait` does."""
        if self.handle is None:
            return self.begin()
        turn = context.wait(self.loop.create_future(), inf, "its turn to be understood")
        self.waiting.setdefault(owner, deque()).append(turn)
        await turn

    def begin(self):
        self.began = self.loop.time()
        self.handle = self.loop.call_soon(self.pause)  # right after the owner whose turn it is

    def pause(self):
        self.handle = self.loop.call_later(self.loop.time() - self.began, self.next)

    def next(self):
        self.handle = None
        while self.waiting and self.handle is None:
            owner, turns = self.waiting.popitem(last=False)
            if Stream.wake(turns.popleft()):  # False if that task has left
                self.begin()
            if turns:
                self.waiting[owner] = turns


WINDOW_BITS = {"gzip": 31, "x-gzip": 31, "deflate": 15}  # for zlib, by content coding


class RequestBody:
    """What a client sends after its head, carried or read whole. It may fall behind
    BYTES_PER_SECOND by FREE_SECONDS, and be silent for SILENT_SECONDS: neither a trickle keeps it
    open nor what came long ago. 100 Continue is sent when, and only if, somebody wants to read."""
    FREE_SECONDS = 60
    SILENT_SECONDS = 30
    BYTES_PER_SECOND = 16384
    INFLATED_AT_ONCE = 1 << 20  # bytes, which take 3 ms
    FAILURES = {Transfer.MALFORMED: BrokenBody, Transfer.SILENT: RequestTimeout,
                Transfer.BROKEN_OFF: CallerGone, Transfer.SLOW: TimeoutError}
    owner: Optional[CallerKey] = None  # whose share of the budget it uses
    held = 0      # bytes of the budget
    received = 0  # bytes of payload

    def __init__(self, client: Stream, request: Request, budget: MemoryBudget):
        self.client = client
        self.budget = budget
        self.length = request.length
        self.framing: Framing = Chunked() if request.length is None else Sized(request.length)
        self.coding = (request.get("content-encoding") or "identity").lower()
        self.continue_awaited = "expect" in request.lines and request.version == 1
        if self.continue_awaited and request.get("expect").lower() != "100-continue":
            raise UnsupportedExpectation
        self.came_at = client.loop.time()
        self.behind_at = self.came_at + self.FREE_SECONDS

    @property
    def ended(self) -> bool:
        return self.framing.ended

    def due(self) -> float:
        """Returns when the next bytes must have come, in the loop's time."""
        return min(self.behind_at, self.came_at + self.SILENT_SECONDS)

    def count(self, size: int):
        """Counts bytes that came."""
        self.came_at = self.client.loop.time()
        self.received += size
        self.behind_at = min(self.behind_at + size / self.BYTES_PER_SECOND,
                             self.came_at + self.FREE_SECONDS)

    def invite(self):
        if self.continue_awaited:
            self.continue_awaited = False
            self.client.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    async def read(self, most: int, context: Context) -> bytes:
        """Returns the body of a metered call, of at most `most` bytes. Raises UnsupportedEncoding,
        BodyTooLarge, BrokenBody, BadRequest, RequestTimeout, Overloaded, CallerGone."""
        if self.coding != "identity" and self.coding not in WINDOW_BITS:
            raise UnsupportedEncoding
        if self.length is not None and self.length > most:
            raise BodyTooLarge
        self.invite()
        pieces = []
        while not self.ended:
            seconds = self.due() - self.client.loop.time()
            try:
                if not (self.client.read_buffer or await self.client.more(
                        context, seconds, "the request's body")):
                    raise CallerGone
            except TimeoutError:
                raise RequestTimeout from None
            except OSError:
                raise CallerGone from None
            pieces.append(self.unwrap())
            if self.received > most:
                raise BodyTooLarge
            self.hold(self.received)
        body = b"".join(pieces)
        return body if self.coding == "identity" else await self.inflate(body, most)

    def hold(self, size):
        """Counts bytes against the budget, but for small bodies."""
        if size > self.held + self.budget.SMALL:
            self.budget.take(size - self.held, self.owner)
            self.held = size

    async def inflate(self, data, most):
        """Returns what was compressed, of at most `most` bytes; others run in between."""
        bits = WINDOW_BITS[self.coding]
        if self.coding == "deflate" and data and data[0] & 15 != 8:
            bits = -bits  # without the header of RFC 1950, which some leave out
        inflater = zlib.decompressobj(bits)
        pieces, size = [], 0
        while not inflater.eof:
            try:
                piece = inflater.decompress(data, self.INFLATED_AT_ONCE)
            except zlib.error:
                raise BadRequest("The request body is not compressed as its head says") from None
            data = inflater.unconsumed_tail
            size += len(piece)
            if not piece and not data and not inflater.eof:
                raise BadRequest("The request body is not whole")
            if size > most:
                raise BodyTooLarge
            self.hold(self.received + size)
            pieces.append(piece)
            await asyncio.sleep(0)
        if inflater.unused_data:
            raise BadRequest("Something follows the compressed request body")
        return b"".join(pieces)

    def unwrap(self) -> bytes:
        """Takes what has come out of its framing; what follows the body stays."""
        try:
            _, payload = self.framing.feed(self.client.take_all())
        except Malformed:
            raise BrokenBody from None
        self.count(len(payload))
        if self.ended:
            self.client.read_buffer = self.framing.trailing
        return payload

    async def upload(self, upstream: Stream, context: Context, seconds: float) -> bool:
        """Carries a body of any size; returns False if the upstream answered, or stopped reading,
        before all was sent. It may pause for so many `seconds`. Raises as `read` does, and
        TimeoutError where the upstream is slow."""
        if self.ended:  # only its fields speak of a body
            return await upstream.drain(context, seconds, "room for the request", True)
        self.invite()
        with Upload(self, upstream, seconds) as transfer:
            try:
                ending = await context.wait(transfer.done, inf, "the request's body")
            except TimeoutError:  # the call's own deadline
                ending = Transfer.SILENT
        if self.ended:
            self.client.read_buffer = self.framing.trailing + self.client.read_buffer
        if ending in self.FAILURES:
            raise self.FAILURES[ending]()
        if ending == Transfer.WHOLE:
            return await upstream.drain(context, seconds, "room for the request's body", True)
        self.client.discarding = not self.skip()  # else it is all here, and the next request comes
        return False

    def skip(self) -> bool:
        """Drops what has come of the body; returns whether nothing of it is left."""
        if not self.ended and self.client.read_buffer and not self.continue_awaited:
            with suppress(BrokenBody):
                self.unwrap()
        return self.ended

    def release(self):
        """Gives the body's bytes back to the budget."""
        if self.held:
            self.budget.give_back(self.held, self.owner)
            self.held = 0


class Upload(Transfer):
    """A request's body on its way up, which ends when the upstream answers early."""
    ANSWERED = "answered"
    GRACE_SECONDS = 5  # for a client that had to wait for a slow upstream

    def __init__(self, body: RequestBody, upstream: Stream, seconds: float):
        self.body = body
        style = CHUNKED if body.length is None else PAYLOAD
        super().__init__(body.client, upstream, BodyAdapter(body.framing, style), seconds, seconds)

    def __enter__(self) -> "Upload":
        upstream = self.target
        upstream.sink = self.on_answer
        upstream.on_end = upstream.on_write_failed = self.on_answer
        upstream.resume_reading()
        super().__enter__()
        if upstream.read_buffer or upstream.ended or upstream.write_failed:
            self.on_answer()
        return self

    def __exit__(self, *exception: Any):
        super().__exit__(*exception)
        self.target.sink = self.target.on_end = self.target.on_write_failed = None

    def on_answer(self, data=b""):
        self.target.read_buffer += data
        self.finish(self.ANSWERED)

    def on_data(self, data: bytes):
        super().on_data(data)
        self.body.count(self.adapter.passed - self.body.received)

    def due(self) -> float:
        return max(self.body.due(), self.target.wrote_at + self.GRACE_SECONDS)


# --------------------------------------------------------------------------------------------------
# Line: the slots of a busy upstream, and the fair queue before them. It knows callers by a key and
# a weight. It does not wait, and does not know what does: a ticket calls back when its turn comes.
# --------------------------------------------------------------------------------------------------

class QueueLimits:
    """Limits how many calls may wait in all queues together: at most `most`, at most `per_caller`
    of one caller, and each for at most `seconds`."""
    waiting = 0
    closed = False

    def __init__(self, most: int, per_caller: int, seconds: float):
        self.most = most
        self.per_caller = per_caller
        self.seconds = seconds
        self.by_caller = {}  # key -> the tickets that wait, oldest first

    def add(self, ticket):
        self.waiting += 1
        self.by_caller.setdefault(ticket.owner.key, []).append(ticket)

    def remove(self, ticket):
        key = ticket.owner.key
        self.waiting -= 1
        self.by_caller[key].remove(ticket)
        if not self.by_caller[key]:
            del self.by_caller[key]

    def shrink(self):
        """Turns away calls that came when it was not known that they must wait."""
        for tickets in list(self.by_caller.values()):
            for ticket in tickets[self.per_caller:]:
                ticket.turn_away()
        while self.waiting > self.most:
            max(self.by_caller.values(), key=len)[-1].turn_away()

    def admits(self, key):
        """Returns whether one more call of this caller may wait. If the queues are full, the caller
        with most waiting calls loses its last one, unless that would only swap the two."""
        own = len(self.by_caller.get(key, ()))
        if self.closed or own >= self.per_caller:
            return False
        if self.waiting >= self.most:
            most = max(self.by_caller.values(), key=len, default=())
            if len(most) < own + 2:
                return False
            most[-1].turn_away()
        return True


class CallerQueue:
    """The calls of one caller that run or wait. `due` is the virtual time at which its next call
    begins; `last` is the number of the last one that began."""
    last = 0
    running = 0

    def __init__(self, key, weight, due):
        self.key = key
        self.weight = weight
        self.due = due
        self.waiting = deque()  # of Tickets

    def turn(self):
        """Returns the order: smallest virtual time; ties by least recently served, then by first
        come. Sums of fractions are not exact, so times are rounded."""
        return round(self.due, 6), self.last, self.waiting[0].number


class Ticket:
    """One call's place: first it waits, then it is `running`, until it leaves. `on_ready` is called
    once, when a waiting call may run, is turned away or the queue closes. `since` is when it began
    to wait."""
    on_ready: Optional[Callable[[], None]] = None
    running = False
    left = False
    parting = False  # it stays until the upstream has noticed that its caller left

    def __init__(self, queue, owner, number, since):
        self.queue = queue
        self.owner = owner
        self.number = number
        self.since = since

    def waited(self) -> int:
        """Returns for how long it has waited, in milliseconds."""
        return int((self.queue.clock.monotonic() - self.since) * 1000)

    def call_back(self):
        on_ready = self.on_ready
        self.on_ready = None
        if on_ready:
            on_ready()

    def leave(self):
        """Gives up the place; a second time it does nothing."""
        if not self.left:
            self.left = True
            self.queue.leave(self)

    def turn_away(self):
        """Takes its place from a waiting call, for a caller with fewer calls."""
        self.leave()
        self.call_back()


class FairQueue:
    """Lets `most` calls run at once. The others wait, each caller's in the order they came, and
    callers take turns, as many as their weight says. This is fair queueing (Demers, Keshav and
    Shenker, 1989) with calls that all cost the same. Virtual time advances by 1 per round over all
    callers with calls: a new caller is served before one that was served recently, and newcomers
    cannot starve the others."""
    running = 0
    now = 0.0     # virtual time
    short = True  # whether a call that finds no slot must wait, as far as is known

    def __init__(self, most: int, limits: QueueLimits, clock: Any):
        self.most = most
        self.limits = limits
        self.clock = clock
        self.numbers = itertools.count(1)  # of calls that come, and of those that begin
        self.queues = {}                   # of callers, by key

    def __repr__(self):
        return f"<FairQueue {self.running} of {self.most} run, {self.stats()}>"

    def enter(self, key: CallerKey, weight: int, waited: float = 0) -> Ticket:
        """Returns a ticket, waiting or running, for a call that has waited elsewhere for `waited`
        seconds. Raises QueueRefused where too many wait."""
        owner = self.queues.get(key) or CallerQueue(key, weight, self.now)
        ticket = Ticket(self, owner, next(self.numbers), self.clock.monotonic() - waited)
        full = self.running >= self.most
        if full and self.short and not self.limits.admits(key):
            raise QueueRefused("queue full")
        self.queues[key] = owner
        if not owner.waiting:
            owner.due = max(owner.due, self.now)
        if full:
            owner.waiting.append(ticket)
            self.limits.add(ticket)
        else:  # then nobody waits
            self.start(ticket)
        return ticket

    def start(self, ticket):
        owner = ticket.owner
        owner.running += 1
        self.running += 1
        active = [one.weight for one in self.queues.values() if one.running or one.waiting]
        before = self.now
        self.now = max(before, owner.due) + 1 / sum(active)
        # A caller that fell behind must not get two turns before a new one gets one.
        owner.due = max(owner.due + 1 / owner.weight, before)
        owner.last = next(self.numbers)
        ticket.running = True
        ticket.call_back()

    def leave(self, ticket):
        owner = ticket.owner
        if ticket.running:
            self.running -= 1
        else:
            owner.waiting.remove(ticket)
            self.limits.remove(ticket)
        self.start_next()
        owner.running -= ticket.running  # only now: it counts among those who take turns
        # While others wait, a caller without calls is remembered: else it would come back as new.
        busy = self.running >= self.most
        self.queues = {one.key: one for one in self.queues.values()
                       if one.running or one.waiting or (busy and one.due > self.now)}

    def start_next(self):
        """Starts the call whose turn it is, if one waits and there is a slot."""
        waiting = [one for one in self.queues.values() if one.waiting]
        if waiting and self.running < self.most and not self.limits.closed:
            ticket = min(waiting, key=CallerQueue.turn).waiting.popleft()
            self.limits.remove(ticket)
            self.start(ticket)

    def close(self):
        """Ends all waiting, in every queue with these limits, and tells the calls that wait in this
        one."""
        self.limits.closed = True
        for owner in self.queues.values():
            for ticket in owner.waiting:
                ticket.call_back()

    def position(self, ticket: Ticket) -> int:
        """Returns how many calls will begin before this one, as it looks now."""
        owner = ticket.owner
        if ticket not in owner.waiting:
            return 0
        ahead = owner.waiting.index(ticket)
        due = owner.due + ahead / owner.weight
        for one in self.queues.values():
            if one is not owner and one.waiting:
                # of two that are due at once the one whose order is smaller comes first
                tie = 1e-6 if one.turn()[1:] < owner.turn()[1:] else -1e-6
                turns = ceil((due - one.due) * one.weight + tie)
                ahead += min(len(one.waiting), max(0, turns))
        return ahead

    def slots(self) -> int:
        """Returns how many calls may run at once."""
        return self.most

    def waiting(self) -> List[Ticket]:
        return [ticket for one in self.queues.values() for ticket in one.waiting]

    def stats(self) -> Dict[str, int]:
        """Returns the numbers for /health."""
        waiting = self.waiting()
        return {"waiting": len(waiting),
                "longest_ms": max([ticket.waited() for ticket in waiting], default=0)}


# --------------------------------------------------------------------------------------------------
# Stored: what callers made that upstreams keep for the account (files, batches, responses ...):
# whose it is, where it is, and what its making is yet to be charged. It knows no wire names.
# --------------------------------------------------------------------------------------------------

class Thing(NamedTuple):
    """A stored object (file, batch, response ...): who made it, and the upstream and the address
    that have it."""
    owner: CallerKey
    upstream: str
    address: str


class Bill(NamedTuple):
    """The charge of a background call, which is final once its usage is known."""
    hold: Hold
    call: Call
    characters: int = 0  # of its answer, as far as somebody has asked for that

    def seen_usage(self, model):
        """Returns the least that it used, for an upstream that reports nothing."""
        output = min(self.hold.output_tokens, ceil(self.characters / CHARACTERS_PER_TOKEN))
        return Usage(self.hold.costs[PROMPT], output, estimated=True, model=model)


class Stored:
    """Remembers things by name, the last ROOM that were made. `policy`: to `pass` all, let each
    caller have its `own`, or `refuse` all. `unsaved` are things for the ledger, None where one is
    forgotten."""
    ROOM = 100_000
    SHARE = 20_000  # things of one owner
    UNSAVED = 10_000
    BILLS = 1_000
    NAME = re.compile("[!-~]{1,256}")
    redis: Optional["Redis"] = None

    def __init__(self, policy: str):
        self.policy = policy
        self.things = OrderedDict()  # Thing by name
        self.names = defaultdict(dict)  # of each owner's things, oldest first
        self.unsaved = deque()
        self.bills = OrderedDict()  # Bill by name

    def __repr__(self) -> str:
        return f"<Stored: {self.policy}, {len(self.things)} things, {len(self.bills)} bills>"

    def find(self, call, owner):
        """Returns one of the things that a call speaks of, None where it is free to go anywhere.
        Raises Forbidden, NothingStored."""
        path, names = call.stored, call.references()
        if self.policy == "refuse" and (path or names):
            raise Forbidden("What upstreams store is not passed on")
        # A run of an eval may be another's than the eval.
        names += filter(self.things.__contains__, [self.bill_name(call)])
        things = list(map(self.things.get, names))
        if path and path.name:
            things.insert(0, self.things.get(self.full_name(path.collection, path.name)))
        if path and path.name == "/" and self.bills:
            raise NothingStored  # nobody would know that it must be paid for
        if self.policy == "own":
            if path and path.is_listed:
                raise Forbidden("Lists of what is stored are not passed on")
            if any(one is None or one.owner != owner for one in things):
                raise NothingStored
        return next(filter(None, things), None)

    def bill_name(self, call):
        """Returns the name of the call whose answer this one asks for, if it does."""
        if not call.stored:
            return None
        collection, name, _ = call.stored
        _, _, last = ABOUT_THING.sub("", call.path).rpartition("/")
        is_answer = last == name or collection == "evals"  # the runs of the eval are asked for
        return self.full_name(collection, last) if is_answer else None

    def full_name(self, collection, name):
        """Returns the name of a thing as its maker was told it: some begin with the collection."""
        full = f"{collection}/{name}"
        return full if full in self.things else name

    def owe(self, name, bill):
        """Keeps an open bill; the oldest above BILLS is dropped."""
        put_newest(self.bills, name, bill, self.BILLS)

    def pay(self, name: str, entry: "Entry"):
        """Forgets a bill that a call has paid, whose entry this is."""
        del self.bills[name]

    def put(self, name, thing):
        """Keeps a thing; its owner's oldest above SHARE is dropped, else the oldest above ROOM."""
        if name in self.things:
            return
        own = self.names[thing.owner]
        self.things[name], own[name] = thing, None
        if len(own) > self.SHARE:
            self.forget(next(iter(own)))
        elif len(self.things) > self.ROOM:
            self.forget(next(iter(self.things)))

    def forget(self, name):
        owner = self.things.pop(name).owner
        del self.names[owner][name]
        if not self.names[owner]:
            del self.names[owner]
        self.save(name, None)

    def save(self, name, thing):
        if len(self.unsaved) < self.UNSAVED:
            self.unsaved.append((name, thing))

    def note(self, thing, names):
        """Remembers what was made. The first maker keeps it: an answer may name older things."""
        for name in names:
            if name in self.things or not self.NAME.fullmatch(name):
                continue
            self.put(name, thing)
            self.save(name, thing)


class NameReader:
    """Finds what a response says was made, in a copy of it on its way past: in JSON, or in the
    first events that name something, or `of_all`."""
    MAX_KEPT = 1 << 20
    MAX_TRIES = 20

    tries = 0

    def __init__(self, events, on_names, of_all):
        """`events` is None where the response is no stream."""
        self.events = events
        self.on_names = on_names
        self.of_all = of_all
        self.kept: Optional[bytearray] = bytearray()  # None when nothing more is looked for

    def feed(self, payload: bytes) -> bytes:
        if self.kept is not None and (self.kept or not self.of_all or self.may_name(payload)):
            self.kept += payload
            ends = self.events.ends if self.events else ()
            may_be_whole = payload[-16:].rstrip().endswith(b"}") or any(
                [end in payload for end in ends])
            if may_be_whole and self.tries < self.MAX_TRIES:
                self.look()
            if self.kept and len(self.kept) > self.MAX_KEPT:
                self.name(names_made(front(bytes(self.kept))))
                self.kept = None
        return payload

    def may_name(self, data):
        """Returns whether events may name something, or are not whole."""
        return data.find(b'id"') >= 0 or not self.events.at_boundary(data)

    def flush(self) -> bytes:
        if self.kept:
            self.look()
        return b""

    def look(self):
        data = bytes(self.kept)
        pieces = self.events.split(data) if self.events else [data]
        read = self.events.payload if self.events else object_in  # {} where it has not come whole
        names = [name for piece in pieces if not self.of_all or self.may_name(piece)
                 for name in names_made(read(piece))]
        self.tries += not self.of_all
        is_over = self.events and self.tries >= self.MAX_TRIES or names and not self.of_all
        self.kept = None if is_over else bytearray(pieces[-1])
        self.name(names)

    def name(self, names):
        if names:
            self.on_names(names)


# --------------------------------------------------------------------------------------------------
# Upstreams: the one place that opens sockets for calls, and only to configured addresses: no
# header, path or body of a caller can change host, port or scheme. http.client opens connections;
# responses are read by Wire. An Address knows connections; an Upstream which of its addresses to
# ask; Routes which upstreams a call may go to. They know no callers and no buckets.
# --------------------------------------------------------------------------------------------------

# What of a caller's head goes upstream, by the beginnings of names; all else could name the caller,
# choose another account beside our key, or mean something to a proxy on the way.
# The last two lines are tracing: W3C, B3, AWS, Jaeger, Sentry, Datadog, Google.
UPSTREAM_FIELDS = re.compile("|".join("""
    content-(type|encoding|language|disposition|range|md5|digest) digest range if-.*
    accept(-.*)? user-agent cache-control prefer (x-)?idempotency-key
    anthropic-.* openai-beta x-stainless-.* x-goog-api-client x-title
    http-referer referer x-request-id x-client-request-id
    trace(parent|state) baggage b3 x-b3-.* x-amzn-trace-id uber-trace-id
    sentry-trace x-datadog-.* x-cloud-trace-context""".split()))
# ... and what belongs to the account of a caller whose own key goes up.
ACCOUNT_FIELDS = re.compile("openai-(organization|project)|x-goog-user-project")
# Whatever PASS_HEADERS says: the caller's key, and what is ours to write.
NEVER_UPSTREAM = HOP_BY_HOP.union(
    CREDENTIAL_FIELDS, (AZURE_CREDENTIAL_FIELD, "host", "content-length", "expect"))
MAX_INTERIM_RESPONSES = 16  # 1xx, before the real one
CONTENT_METHODS = "POST", "PUT", "PATCH"  # they tell their length even if it is 0 (RFC 9110 8.6)


class Response:
    """An upstream's response: a checked head, and a body that is still arriving. As a with-block it
    keeps the connection for the next call if, and only if, the body came whole and nothing
    after."""
    streamed = False  # whether its body is a stream of events
    released = False
    ticket = None     # the place of its call, which ends with it
    hides = frozenset()  # header fields that it must not show

    def __init__(self, address: "Address", stream: Stream, head: ResponseHead, method,
                 request_was_sent):
        self.address = address
        self.stream = stream
        self.head = head
        self.status = head.status
        self.secret = address.hidden  # a key that it must not show
        self.reusable = request_was_sent and not (
            head.close_after or stream.write_buffer or stream.write_failed)
        # Whether it has no body by its nature (RFC 9112 6.3), though some send one
        self.bodiless = method == "HEAD" or head.status in (204, 304)
        self.length = head.length  # the head object is reused for the next response
        if self.bodiless:
            self.framing = Sized(0)
        elif self.length is not None:
            self.framing = Sized(self.length)
        else:
            self.framing = Chunked() if head.chunked else UntilClose()

    def __repr__(self) -> str:
        return "<Response %d from %r, %s>" % (
            self.status, self.address, "whole" if self.framing.ended else "arriving")

    def __enter__(self) -> "Response":
        return self

    def release(self):
        """Counts one call less at the upstream: the response is complete, or nobody wants it any
        more."""
        self.released = True
        self.address.running -= 1
        if self.ticket:
            self.ticket.leave()

    def __exit__(self, kind, *_):
        framing, stream = self.framing, self.stream
        if kind is CallerGone and self.ticket and not (framing.ended or stream.ended):
            self.address.part_with(stream, self.ticket, framing=framing)
            self.ticket = None
            return self.release()
        if not self.released:
            self.release()
        if self.reusable and framing.ended and not (
                framing.trailing or stream.read_buffer or stream.ended):
            self.address.keep(stream, self.streamed or self.bodiless)
        else:
            stream.close()

    async def read(self, context: Context, most: int = 1 << 22, seconds: float = inf) -> bytes:
        """Returns its body, of at most `most` bytes, awaited for at most so many `seconds`. Raises
        UpstreamFailed, UpstreamTimeout."""
        transport, framing = self.address.transport, self.framing
        deadline = context.loop.time() + min(seconds, transport.read_timeout)
        body = b""
        try:
            while len(body) <= most:
                body += framing.feed(self.stream.take_all())[1]
                if framing.ended:
                    return body
                if not await self.more(context, deadline):
                    if framing.end_of_stream():
                        return body
                    break
        except TimeoutError:
            raise UpstreamTimeout from None
        except (OSError, Malformed) as failure:
            raise UpstreamFailed(failure) from None
        raise UpstreamFailed("answer was cut or too long")

    async def mentions(self, words: bytes, context: Context) -> bool:
        """Tells whether its body, up to 64 KiB of it, speaks of `words`. It is read, and stays to
        be passed on."""
        stream = self.stream
        deadline = context.loop.time() + min(5, self.address.transport.read_timeout)
        with suppress(Malformed, OSError):  # TimeoutError is one, too
            while True:
                framing = copy.copy(self.framing)
                _, payload = framing.feed(stream.read_buffer)
                if (words in payload or framing.ended or stream.ended
                        or len(stream.read_buffer) > 65536):
                    return words in payload
                await self.more(context, deadline)
        return False

    def more(self, context, deadline):
        left = deadline - context.loop.time()
        return self.stream.more(context, left, self.address.what_body)


STATES = "closed", "half_open", "open"  # of breakers, the best first


class Breaker:
    """Keeps calls from what fails. `most` failures in a row open it for `seconds`; then one call
    tries whether it can be closed. A try that takes longer than that does not keep others from
    trying, too. An open breaker stops the callers whose calls failed, as these calls may be at
    fault; it stops all if calls from two origins failed, and none succeeded for `seconds` since it
    `began`. All keys that one address invents are of one origin."""
    MAX_CALLERS = 100

    def __init__(self, most: int, seconds: float, began: float = 0.0):
        self.most = most
        self.seconds = seconds
        self.failures = 0
        self.began = began
        self.opened = None
        self.trying = False
        self.callers = {}     # keys of those whose calls failed, the last ones,
        self.origins = set()  # and up to two of their origins

    def concerns(self, now, caller):
        return self.opened is not None and (
            caller is None or caller.key in self.callers
            or self.fails_for_two() and now >= self.began + self.seconds)

    def fails_for_two(self):
        return len(self.origins) > 1

    def seconds_left(self, now, caller=None):
        """Returns how long no call may be made; 0 or less: it may."""
        return self.opened + self.seconds - now if self.concerns(now, caller) else 0

    def enter(self, now, caller=None):
        """Notes that a call is made."""
        if self.concerns(now, caller):
            self.opened = now
            self.trying = True

    def judge(self, good, now, caller=None):
        """Notes that a call succeeded, failed, or (None) ended before that was known."""
        if self.trying and good is None:
            self.opened = now - self.seconds  # the next one may try
        self.trying = False
        if good:
            self.failures = 0
            self.opened = None
        elif good is False:
            self.failures += 1
            if caller:
                put_newest(self.callers, caller.key, None, self.MAX_CALLERS)
                if not self.fails_for_two():
                    self.origins.add(caller.origin)
            if self.opened is not None or self.failures >= self.most:
                self.opened = now

    def state(self, now):
        if self.opened is None:
            return "closed"
        return "half_open" if self.trying or self.seconds_left(now) <= 0 else "open"


Subject = Tuple[str, Caller]  # (model, caller that asks for it)


class Breakers:
    """The breakers of one address: one for its connections, and one for each model that failed
    lately, because what one caller asks for must not close the address to the others."""

    def __init__(self, most: int, seconds: float):
        self.most = most
        self.seconds = seconds
        self.connections = Breaker(most, seconds)
        self.models = OrderedDict()
        self.troubled = False  # whether anything failed lately

    def fails_for_all(self) -> bool:
        """Tells whether the address fails for more callers than one."""
        return self.connections.opened is not None or any(
            breaker.opened is not None and breaker.fails_for_two()
            for breaker in self.models.values())

    def is_tried(self, subject) -> bool:
        """Tells whether an open breaker waits for the result of this call."""
        return any(breaker.trying for breaker, _ in self.concerning(subject))

    def concerning(self, subject):
        concerned = [(self.connections, None)]
        if subject and subject[0] in self.models:
            model, caller = subject
            concerned.append((self.models[model], caller))
        return concerned

    def seconds_left(self, now, subject):
        return max([breaker.seconds_left(now, caller)
                    for breaker, caller in self.concerning(subject)])

    def enter(self, now, subject):
        for breaker, caller in self.concerning(subject):
            breaker.enter(now, caller)

    def judge(self, good: Optional[bool], connected: bool, now: float,
              subject: Subject) -> List[str]:
        """Notes that a call succeeded, failed, or (None) ended before that was known; `connected`:
        it came as far as a connection. Returns what changed, in words."""
        model, caller = subject
        if good is False and connected and model not in self.models:
            put_newest(self.models, model, Breaker(self.most, self.seconds, now), KNOWN_MODELS)
        news = self.judge_one(self.connections, connected if good is False else good, now, None, "")
        breaker = self.models.get(model)
        if breaker and connected:
            what = " with the model %s" % ascii(model[:80]) if model else ""
            news += self.judge_one(breaker, good, now, caller, what)
            if not breaker.failures:
                del self.models[model]
        self.troubled = bool(self.models or self.connections.failures)
        return news

    @staticmethod
    def judge_one(breaker, good, now, caller, what):
        before = breaker.opened
        breaker.judge(good, now, caller)
        if (before is None) == (breaker.opened is None):
            return []
        if before is not None:
            return ["is well again" + what]
        whom = " by its one caller" if len(breaker.callers) == 1 else ""
        return ["failed %d times in a row%s, left alone%s for %g s" % (
            breaker.failures, what, whom, breaker.seconds)]

    def state(self, now: float) -> str:
        """Returns the worst of them."""
        states = [one.state(now) for one in (self.connections, *self.models.values())]
        return max(states, key=STATES.index)


class TransportConfig(NamedTuple):
    """How upstreams are reached: timeouts in seconds, TLS for those that speak it, and the proxy on
    the way out."""
    open_timeout: float
    first_byte_timeout: float
    read_timeout: float
    tls: Optional[ssl.SSLContext] = None
    tunnel: Optional[Endpoint] = None
    no_tunnel: str = ""


class TunnelResponse(http.client.HTTPResponse):
    """A proxy's answer to CONNECT. http.client would take a 1xx that comes before it for it."""

    def _read_status(self):
        for _ in range(MAX_INTERIM_RESPONSES):
            status_line = super()._read_status()
            if not 100 <= status_line[1] < 200:
                break
            http.client.parse_headers(self.fp)
        return status_line


SPARE_SECONDS = 3  # uvicorn, Node and llama.cpp close idle connections after 5
MAX_UNRIPE = 16    # spare ones that are looked at and cannot be reused yet


class Address:
    """One address of an upstream: its spare connections, and how it fared lately."""
    LOOPBACK_SECONDS = 0.001  # how long a connection to this machine may hold the loop
    # llama.cpp closes after a stream although it promised to keep the connection, and others send
    # the body of a HEAD, which would be taken for the next response.
    REUSE_DELAY = 0.05
    DEAF_SECONDS = 1          # an upstream goes on sending after its caller left
    MAX_CONNECTING = 8        # connections that are opened at once, in helper threads
    hidden = ""               # our key, which no response may show
    may_close = False  # it has closed a spare connection, or spoken there, before its time

    def __init__(self, endpoint: Endpoint, transport: TransportConfig, breakers: Breakers,
                 clock: Any):
        self.endpoint = endpoint
        self.transport = transport
        self.breakers = breakers
        self.clock = clock
        self.running = 0     # calls
        self.connecting = 0  # jobs of helper threads: look-ups, connects and handshakes block
        self.helpers = concurrent.futures.ThreadPoolExecutor(self.MAX_CONNECTING, "connect")
        self.spares = deque()  # (reusable from, stream), oldest left
        self.partings: Set[asyncio.Task] = set()
        self.last = None                   # the head of its last response
        self.first_byte_timeout = transport.first_byte_timeout
        self.tls = transport.tls if endpoint.scheme == "https" else None
        bypass = {"no": transport.no_tunnel}
        direct = not self.tls or urllib.request.proxy_bypass_environment(endpoint.host, bypass)
        self.tunnel = None if direct else transport.tunnel
        self.is_loopback = not self.tls and re.fullmatch(r"127\.[0-9.]+|::1", endpoint.host)
        self.name = endpoint.origin + endpoint.path
        self.host_line = "Host: %s" % endpoint.origin.partition("://")[2]
        self.what_head = "the response of %s" % endpoint.origin
        self.what_body = "the body of the response of %s" % endpoint.origin

    def __repr__(self) -> str:
        return "<Address %s running=%d connecting=%d spare=%d breaker %s>" % (
            self.endpoint.origin, self.running, self.connecting, len(self.spares),
            self.breakers.state(self.clock.monotonic()))

    def target(self, path: str, query: str = "") -> str:
        """Returns the request's target. A base with a path replaces a leading /v1 of the call, and
        one that ends in /v1beta that; a bare host gets the call's path as it is."""
        base = self.endpoint.path
        version = "/" + path[1:].partition("/")[0]
        if base and (version == "/v1" or (version == "/v1beta" and base.endswith(version))):
            path = path[len(version):]
        return (base + path or "/") + ("?" + query if query else "")

    async def send(self, stream, method, head, body, context):
        """Sends one request and waits for the head of its response. Raises UpstreamFailed,
        UpstreamTimeout, and what reading `body` or ending the call raises."""
        try:
            if isinstance(body, bytes):
                if body or method in CONTENT_METHODS:
                    head += b"Content-Length: %d\r\n" % len(body)
                if len(body) <= BLOCK:
                    stream.post(b"%b\r\n%b" % (head, body))
                else:  # a large body is not copied
                    stream.write(head + b"\r\n")
                    stream.write(body)
                request_was_sent = not stream.write_failed
                if stream.write_buffer:
                    request_was_sent = await stream.drain(
                        context, self.transport.read_timeout, "room for the request", True)
            else:
                length = (b"Transfer-Encoding: chunked" if body.length is None
                          else b"Content-Length: %d" % body.length)
                stream.write(b"%b%b\r\n\r\n" % (head, length))
                request_was_sent = await body.upload(stream, context, self.transport.read_timeout)
            return await self.receive(stream, method, request_was_sent, context)
        except BaseException as failure:
            if isinstance(failure, CallerGone) and context.slot and not stream.ended:
                self.part_with(stream, context.slot, method)
            else:
                stream.close()
            if isinstance(failure, TimeoutError):
                raise UpstreamTimeout from None
            if isinstance(failure, (OSError, Malformed)):
                raise UpstreamFailed(failure) from None
            raise

    def part_with(self, stream, slot, method="", framing=None):
        """Leaves a connection whose client has left."""
        def end(parting):  # runs even if the task is cancelled before it began
            self.partings.discard(parting)
            stream.close()
            slot.leave()

        slot.parting = True
        parting = stream.loop.create_task(self.part(stream, slot, method, framing), name="parting")
        self.partings.add(parting)
        parting.add_done_callback(end)

    async def part(self, stream, slot, method, framing):
        """Tells the upstream that nobody wants the response, by closing our side. It may go on
        working: the call's slot is free once it has closed or answered, or after a time."""
        context = Context(stream.loop)
        seconds = self.transport.read_timeout
        deaf_at = stream.loop.time() + self.DEAF_SECONDS
        try:
            stream.shut_down_writing()
            framing = framing or (await self.receive(stream, method, False, context)).framing
            framing.feed(stream.take_all())
            while not framing.ended and await stream.more(context, seconds, self.what_body):
                if stream.loop.time() >= deaf_at:
                    break  # it still sends: that the connection is closed will tell it
                framing.feed(stream.take_all())
        except (UpstreamFailed, Malformed, OSError):
            pass
        finally:
            context.close()

    async def receive(self, stream, method, request_was_sent, context):
        """Waits for the head of a response. `request_was_sent` is False if the upstream answered,
        or stopped reading, before it had it all (RFC 9112 9.5)."""
        seconds = self.first_byte_timeout
        deadline = context.loop.time() + seconds
        if not stream.read_buffer:
            await stream.more(context, seconds, self.what_head)
        for _ in range(MAX_INTERIM_RESPONSES):
            data = stream.take_head() or await stream.read_head(
                STATUS_LINE, context, deadline - context.loop.time(), self.what_head)
            if data is None:
                raise UpstreamFailed(ConnectionAbortedError())
            self.last = head = ResponseHead.read(data, self.last)
            if head.status >= 200:
                return Response(self, stream, head, method, request_was_sent)
            if head.status == 101:
                break  # nobody asked for it: upgrades are not passed on
        raise UpstreamFailed("no final answer")

    # -- connections

    def spare(self):
        """Returns a spare connection that is still silent, the newest first."""
        now = self.clock.monotonic()
        spares, unripe, found = self.spares, [], None
        while spares and not found and len(unripe) < MAX_UNRIPE:
            reusable, stream = spares.pop()
            if reusable > now:
                unripe.append((reusable, stream))
            elif now - reusable < SPARE_SECONDS and stream.is_silent(self.may_close):
                found = stream
            else:
                self.may_close |= now - reusable < SPARE_SECONDS
                stream.close()
        if unripe:
            spares.extend(reversed(unripe))
        return found

    def keep(self, stream, in_doubt):
        """Keeps a connection for reuse; one that may still be sent something or closed is used
        again a little later."""
        reusable = self.clock.monotonic()
        if in_doubt:
            reusable += self.REUSE_DELAY
        stream.idle_since = stream.loop.selector.looks
        self.spares.append((reusable, stream))

    def close_stale(self, everything: bool = False):
        """Closes spare connections that are too old to be used again; called once in a while."""
        oldest = self.clock.monotonic() - SPARE_SECONDS
        while self.spares and (everything or self.spares[0][0] < oldest):
            self.spares.popleft()[1].close()

    def new_owner(self, seconds):
        """Returns http.client's connection, which is yet to connect."""
        endpoint, tunnel = self.endpoint, self.tunnel
        where = tunnel or endpoint
        if not self.tls:
            return http.client.HTTPConnection(where.host, where.port, timeout=seconds)
        owner = http.client.HTTPSConnection(
            where.host, where.port, timeout=seconds, context=self.tls)
        if tunnel:
            owner.response_class = TunnelResponse
            owner.set_tunnel(endpoint.host, endpoint.port, tunnel.proxy_fields)
        return owner

    async def connect(self, context):
        """Raises UpstreamFailed, UpstreamTimeout, Overloaded, and what the call is ended with."""
        began = context.loop.time()
        try:
            sock = self.is_loopback and self.connect_at_once()
            sock = sock or await self.connect_in_helper(context)
        except (TimeoutError, socket.timeout):
            raise UpstreamTimeout(nothing_sent=True) from None
        except (OSError, http.client.HTTPException) as failure:
            raise UpstreamFailed(failure, nothing_sent=True) from None
        except CallerGone as gone:
            gone.nothing_sent = True
            raise
        finally:
            if context.on_connect:
                context.on_connect(context.loop.time() - began)
        keep_alive(sock)
        if self.tls:
            sock.suppress_ragged_eofs = False  # an end without close_notify is a cut
        return Stream(context.loop, sock)

    def connect_at_once(self):
        """Connects to this machine, which takes a few microseconds; returns None where that is not
        possible."""
        owner = self.new_owner(self.LOOPBACK_SECONDS)
        try:
            owner.connect()
            return owner.sock
        except (TimeoutError, socket.timeout):
            owner.close()
            return None

    async def probe(self, context: Context) -> Optional[str]:
        """Connects, for the first call to come; returns why that cannot be done."""
        try:
            self.keep(await self.connect(context), False)
        except Refusal as refusal:
            is_other = self.tls and refusal.cause in ("timed out", "TLS failed")
            hint = " (does it speak https?)" if is_other else ""
            return "upstream %s: %s%s" % (self.endpoint.origin, refusal.cause, hint)

    async def connect_in_helper(self, context):
        """Connects in one of this address's own helper threads, so that a dead address does not
        take all threads."""
        loop, seconds = context.loop, self.transport.open_timeout
        owner = self.new_owner(seconds)
        opened = loop.create_future()

        def connect():
            if not opened.done():
                owner.connect()

        def deliver(job):
            self.connecting -= 1
            if opened.done():
                owner.close()
            elif job.exception():
                owner.close()
                opened.set_exception(job.exception())
            else:
                opened.set_result(owner.sock)

        try:
            job = self.helpers.submit(connect)
        except RuntimeError:  # can't start new thread; an old one may still come to it
            opened.cancel()
            raise Overloaded from None
        self.connecting += 1
        job.add_done_callback(partial(soon, loop, deliver))
        try:
            return await context.wait(
                opened, seconds, "a connection to %s" % self.endpoint.origin)
        finally:
            opened.cancel()  # nobody waits for it any more

    def location(self, value: str, prefix: str) -> str:
        """Returns a redirect to the endpoint itself as callers know it: its address is not theirs
        to learn."""
        if not (value + "/").startswith(self.endpoint.origin + "/"):
            return value
        path = value[len(self.endpoint.origin):] or "/"
        base = self.endpoint.path
        if base and (path + "/").startswith(base + "/"):
            path = "/v1" + path[len(base):]
        return prefix + path


FAILING = (502, 503, 504, 529)  # statuses by which an address says that it cannot work


class Upstream:
    """Where calls go: one name, one key, one or more addresses that can do the same."""

    def __init__(self, config: UpstreamConfig, transport: TransportConfig, retries: int,
                 breaking: Tuple[int, float], limits: QueueLimits, clock: Any,
                 say: Callable[..., None]):
        """`breaking` is (failures in a row, seconds) of the breakers; `say` is called with what the
        operator should know."""
        self.name = config.name
        self.key = config.key
        is_told = self.key in (None, PASSTHROUGH) or len(self.key) < SHORTEST_KEY
        self.hidden = "" if is_told else self.key or ""
        self.globs = config.models
        self.model = config.model
        self.dialect = DIALECTS.get(config.dialect, UNKNOWN_DIALECT)
        self.headers = config.headers
        self.rewrite = QUIRKS.get(config.name)
        self.retries = retries
        self.clock = clock
        self.say = say
        most = config.max_concurrency
        self.queue = FairQueue(most, limits, clock) if most else None
        self.addresses = [Address(endpoint, transport, Breakers(*breaking), clock)
                          for endpoint in config.url]
        for address in self.addresses:
            address.hidden = self.hidden
        self.rotation = 0
        self.disabled = False
        self.without_options = set()  # models that take stream_options for an error here

    def __repr__(self) -> str:
        return "<Upstream %s %r>" % (self.name, self.addresses)

    def serves(self, model: str) -> bool:
        name = self.dialect.model_name(model)
        return any(fnmatch.fnmatchcase(name, glob) for glob in self.globs)

    # -- which address

    def only(self, name: str) -> "Upstream":
        """Returns this upstream with the address of this name alone, if it has it."""
        alone = copy.copy(self)
        alone.addresses = [one for one in self.addresses if one.name == name] or self.addresses
        return alone

    def choose(self, failed, failure, context):
        """Returns the address to ask next, which has one more running call now. Raises `failure`,
        that of the last one, BreakerOpen, and UpstreamTimeout where nobody would wait for the
        response."""
        if context.until < inf and context.expired():
            raise UpstreamTimeout
        address = self.addresses[0]
        if failed or len(self.addresses) > 1 or address.breakers.troubled:
            address = self.least_busy(failed, context.subject)
            if address is None:
                raise failure or self.breaker_open(context.subject) or BreakerOpen(wait=0)
        address.running += 1
        return address

    def least_busy(self, failed, subject):
        """Returns the address with the fewest running calls, None where none can be asked. Without
        a subject it tells nothing of how calls fare there."""
        now = self.clock.monotonic()
        able = [one for one in self.addresses if one not in failed
                and one.breakers.seconds_left(now, subject) <= 0]
        if not able:
            return None
        self.rotation += 1
        first = self.rotation % len(able)
        address = min(able[first:] + able[:first], key=lambda one: one.running)
        if subject:
            address.breakers.enter(now, subject)
        return address

    def judge(self, address: Address, good: Optional[bool], subject: Subject,
              connected: bool = True):
        """Notes that a call succeeded there, failed, or (None) that nobody knows."""
        for news in address.breakers.judge(good, connected, self.clock.monotonic(), subject):
            self.say("upstream %s: %s %s" % (self.name, address.endpoint.origin, news))

    def guard_key(self, response: Response):
        """Keeps an error from telling our own key. Raises KeyRefused for a 401 about that key. The
        operator is told, once a minute."""
        if self.hidden:
            response.hides |= {"content-encoding"}  # it is unpacked
        if response.status != 401 or self.key in (None, PASSTHROUGH):
            return
        self.say("UPSTREAM %s REFUSES ITS KEY (status 401): nobody can call it" % self.name,
                 "the key of " + self.name)
        raise KeyRefused

    def breaker_open(self, subject: Optional[Subject]) -> Optional[BreakerOpen]:
        """Returns why no address may be asked yet, None where one may."""
        now = self.clock.monotonic()
        wait = min([one.breakers.seconds_left(now, subject) for one in self.addresses])
        return BreakerOpen(wait=wait) if wait > 0 else None

    def states(self) -> List[str]:
        """Returns the state of each address."""
        now = self.clock.monotonic()
        return [one.breakers.state(now) for one in self.addresses]

    def can_connect(self) -> bool:
        """Tells whether calls may be sent to one of its addresses. What fails behind a connection,
        for one model, is no reason to keep all others away."""
        now = self.clock.monotonic()
        return any(one.breakers.connections.state(now) != "open" for one in self.addresses)

    def stats(self) -> JsonObject:
        """Returns what /health says of it."""
        states = self.states()
        best = min(states, key=STATES.index)
        stats = {"state": "disabled" if self.disabled else best,
                 "in_flight": sum([one.running for one in self.addresses]),
                 "addresses": "%d/%d" % (states.count("closed"), len(states))}
        if self.queue:
            stats["queue"] = self.queue.stats()
        return stats

    # -- what is asked

    async def send_patiently(self, method, head, body, context):
        """Does as `send_once`, and asks again where the upstream asks for patience."""
        for _ in range(self.retries):
            response = await self.send_once(method, head, body, context)
            patience = response.head.get("retry-after", "")
            if response.status not in (429, 503) or not re.fullmatch("[0-5]", patience):
                return response
            with response:
                pass  # it is left unread
            await context.sleep(int(patience), "Retry-After")
        return await self.send_once(method, head, body, context)

    async def send_once(self, method: str, head: Callable[[Address], bytes],
                        body: Union[bytes, RequestBody], context: Context) -> Response:
        """Sends one request and waits for the head of its response. `head` gives the request's, but
        for the lines that frame its body. An address that cannot be reached was sent nothing, so
        the next one is asked. Without a subject it says nothing of how calls fare there. Raises
        UpstreamFailed, UpstreamTimeout, BreakerOpen, and what `body` raises."""
        failed = []
        failure = None
        stale = False
        while True:
            address = self.choose(failed, failure, context)
            response = good = None
            stream = spare = None if stale else address.spare()
            try:
                stream = spare or await address.connect(context)
                response = await address.send(stream, method, head(address), body, context)
                good = response.status not in FAILING
                return response
            except (UpstreamFailed, UpstreamTimeout) as refusal:
                good = self.verdict(refusal, spare, body, context)
                stale = spare and not body and self.is_repeatable(method, refusal)
                if not (refusal.nothing_sent or stale):
                    raise
                failure = refusal
                failed += [] if stale else [address]
            finally:
                # Whether a call went well is known at its end, but one that tries an open breaker
                # must not keep others waiting for that.
                breakers = address.breakers
                if context.subject and (not good or (
                        breakers.troubled and breakers.is_tried(context.subject))):
                    self.judge(address, good, context.subject, stream is not None)
                if response is None:
                    address.running -= 1

    @staticmethod
    def is_repeatable(method, refusal):
        """Tells whether what a spare connection lost, because it was closed under us, can be asked
        again (RFC 9110 9.2.2)."""
        return method in ("GET", "HEAD") and refusal.broke_before_response

    @staticmethod
    def verdict(refusal, spare, body, context):
        """Returns False where the address is to blame. It is not for a malformed response, the
        call's own deadline, a spare connection that was closed under us, or an upload that took so
        long that it may have tired of waiting for the client."""
        uploading = not (refusal.nothing_sent or isinstance(body, bytes) or body.ended)
        if uploading or context.expired():
            return None
        failed = isinstance(refusal, UpstreamTimeout) or refusal.broke_before_response and not spare
        return False if failed else None

    def head(self, method: str, path: str, query: str, dialect: Dialect, key: Optional[str],
             lines: List[str], address: Address) -> bytes:
        """Returns the head of a request, but for the lines that frame its body. The header lines
        that are set for this upstream win over `lines`, and over the one that holds its `key`."""
        if key:
            lines = [dialect.CREDENTIAL % key] + lines
        lines = [line for line in lines if line.partition(":")[0].lower() not in self.headers]
        start = "%s %s HTTP/1.1" % (method, address.target(path, query))
        return "\r\n".join(
            [start, address.host_line, *self.headers.values(), *lines, ""]).encode("latin-1")

    async def models(self, context: Context) -> List[Model]:
        """Returns its models. Raises UpstreamFailed, UpstreamTimeout, BreakerOpen, and ValueError
        where it answers with something else."""
        if self.model is not None or self.key == PASSTHROUGH:  # one only, or no key to ask with
            named = [name for name in self.globs if not re.search(r"[*?[]", name)]
            return list(map(Model, named or ([self.model] if self.model else [])))
        models = [one._replace(name=self.dialect.model_name(one.name))
                  for one in await self.list_models(context)]
        return [one for one in models if self.serves(one.name)] if self.globs else models

    async def list_models(self, context):
        """Asks for the list of models."""
        path, dialect = self.dialect.place(
            self.dialect.MODELS_PATH, DIALECTS["openai"], metered=False)
        lines = ["Accept: application/json", "Accept-Encoding: identity", *dialect.VERSION_LINES]
        head = partial(
            self.head, "GET", path, dialect.MODELS_QUERY, dialect, self.key, lines)
        with await self.send_once("GET", head, b"", context) as response:
            body = await response.read(context)
            try:
                return dialect.listed_models(parse_response(body))
            except (ValueError, LookupError, TypeError):
                raise ValueError("the upstream answered %d, and no list of models"
                                 % response.status) from None


class Routes:
    """Finds the upstreams of a call: those that its path or its model names, in the order they are
    tried, or the base."""

    def __init__(self, base: Optional[Upstream], named: List[Upstream]):
        self.base = base
        self.named = named
        self.all = ([base] if base else []) + named
        self.by_name = {upstream.name: upstream for upstream in self.all}
        self.known = lru_cache(KNOWN_MODELS)(self.serving)

    def find(self, call: Call, thing: Optional[Thing] = None) -> List[Upstream]:
        """Returns the upstreams of a call; one that names a stored `thing` goes to where that is.
        Raises NoRoute."""
        if not (self.named or thing or self.base.disabled):  # there is no choice
            return self.all
        upstreams = [one for one in self.candidates(call, thing) if not one.disabled]
        if not upstreams:
            raise NoRoute(call.model, cause="upstream disabled")
        return upstreams

    def switch(self, name: str, on: bool):
        """Enables or disables an upstream."""
        self.disable([one.name for one in self.all
                      if (one.disabled if one.name != name else not on)])

    def disable(self, names: Collection[str]):
        """Disables these upstreams, and enables the others."""
        for upstream in self.all:
            upstream.disabled = upstream.name in names
        self.known.cache_clear()  # the next one of the model's serves it

    def candidates(self, call, thing):
        for upstream in self.all if thing else ():
            if thing.upstream == upstream.name and call.prefix in (None, upstream.name):
                return [upstream.only(thing.address)]
        if call.prefix:
            return [self.by_name[call.prefix]]
        if self.base and not call.resolved_model:
            return [self.base]
        upstreams = self.known(call.resolved_model)
        if not upstreams:
            raise NoRoute(call.model)
        return upstreams

    def serving(self, model):
        """Returns the upstreams that serve a model, else the base."""
        upstreams = [upstream for upstream in self.named
                     if upstream.serves(model) and not upstream.disabled]
        # Nobody's own key is for a second vendor.
        upstreams[1:] = [upstream for upstream in upstreams[1:] if upstream.key != PASSTHROUGH]
        return upstreams or ([self.base] if self.base else [])

    def close_queues(self):
        for upstream in self.all:
            if upstream.queue:
                upstream.queue.close()

    def addresses(self) -> List[Address]:
        return [address for upstream in self.all for address in upstream.addresses]

    def close_stale(self, everything: bool = False):
        for address in self.addresses():
            address.close_stale(everything)


# --------------------------------------------------------------------------------------------------
# Books: what is written down of every call. An Entry is filled on the way and recorded once; lines
# and rows are written by threads of their own, so that a log nobody reads or a slow disk never
# holds up a call. It does not know sockets.
# --------------------------------------------------------------------------------------------------

REQUEST_ID = re.compile("[!-~]{1,128}")  # as a caller may choose it
PLAIN_WORD = re.compile(r"[!-\[\]-~]{1,80}")
NO_USAGE = Usage()
# Of the ledger. What is new comes last: a file of an older version gets the columns that it lacks.
COLUMNS = tuple(tuple(column.split()) for column in (
    "id TEXT, time REAL, caller TEXT, address TEXT, method TEXT, path TEXT, dialect TEXT, "
    "model TEXT, served TEXT, upstream TEXT, status INTEGER, outcome TEXT, cause TEXT, "
    "stream INTEGER, input INTEGER, cached INTEGER, cache_write INTEGER, output INTEGER, "
    "reasoning INTEGER, estimated INTEGER, usd REAL, picodollars INTEGER, unpriced INTEGER, "
    "held INTEGER, charges TEXT, first_ms INTEGER, ms INTEGER, bytes INTEGER, "
    "queue_ms INTEGER, team TEXT, tag TEXT, agent TEXT, connect_ms INTEGER, "
    "redacted TEXT").split(", "))
COLUMN_NAMES = tuple(name for name, _ in COLUMNS)
TIME_COLUMN = COLUMN_NAMES.index("time")
# Calls are added up by spans of time, which begin where UTC's do.
DAY, HOUR, QUARTER = SPANS = 86400, 3600, 900
START = f"CAST(coalesce(time, 0) / {QUARTER} AS INTEGER) * {QUARTER}"
# By whom or what they are added up: how a call tells it.
SUM_KEYS = table_of("""
    caller coalesce(caller, '-')
    team coalesce(team, '-')
    tag coalesce(tag, '-')
    model coalesce(nullif(served, ''), nullif(model, ''), '-')
    upstream coalesce(upstream, '-')""")
PASSED = "ok", "limited", "caller_gone"  # outcomes that are nobody's failure
FAILED = f"outcome NOT IN {PASSED!r}"
# What is added up: how much of it is in a call.
SUM_COUNTS = {
    "calls": "1", "failed": FAILED, "limited": "outcome = 'limited'",
    **{name: name for name in (
        "input cached output reasoning estimated unpriced picodollars").split()}}
MOST = 9 * 10 ** 18  # SQLite's integers end at 2**63, and not all that upstreams tell is plausible
LOG_FIELDS = (
    "time id caller method path status model upstream outcome cause stream first_ms ms queue_ms "
    "cost remaining input output estimated usd bytes redacted").split()


def new_request_id(clock: Any) -> str:
    """Returns a UUID that begins with the time (RFC 9562 5.7): an index of such is added to at its
    end, where a random one would change a page for each call."""
    digits = f"{clock.time_ns() // 10 ** 6:012x}{random.getrandbits(72):018x}"
    return f"{digits[:8]}-{digits[8:12]}-7{digits[12:15]}-a{digits[15:18]}-{digits[18:]}"


def clean(text: Optional[str]) -> Optional[str]:
    """Returns text that any file can hold: JSON may spell half a surrogate pair."""
    if text and not text.isascii():
        return text.encode("utf-8", "backslashreplace").decode()
    return text


def in_ascii(text: str) -> str:
    """Returns text in which all that is not printable ASCII is spelled out."""
    return ascii(text)[1:-1]


PIPE_BUF = getattr(select, "PIPE_BUF", 512)  # bytes that a pipe takes as a whole (POSIX write)
MAX_AGENT = 120
UNSEEN = re.compile("[\0-\t\x0b-\x1f\x7f-\x9f]")
SEEN = bytes(range(ord(" "), 0x7f)) + b"\n"


def visible(text: str) -> str:
    """Returns lines of text in which nothing moves a terminal's cursor."""
    return UNSEEN.sub(lambda match: "\\x%02x" % ord(match[0]), text)


def user_agent(fields: Fields) -> Optional[str]:
    """Returns what a client calls itself."""
    return visible(fields.get("user-agent", "")[:MAX_AGENT]) or None


@lru_cache(1000)
def one_word(text):
    """Returns one word of printable ASCII, quoted where the text is none."""
    if not text:
        return "-"
    return text if PLAIN_WORD.fullmatch(text) else ascii(text[:80]).replace(" ", "\\x20")


@lru_cache(4)
def format_second(second):
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))


@lru_cache(16)
def format_moment(milliseconds):
    """Returns a time since 1970 in UTC, as logs have it."""
    return f"{format_second(milliseconds // 1000)}.{milliseconds % 1000:03d}Z"


class Entry:
    """The record of one request. `outcome` is one of ok, limited, refused, upstream_status,
    upstream_failed, upstream_cut, caller_gone, stopped, internal_error."""
    # By how what is awaited begins.
    STATES = (("its turn at", "line"), ("a connection", "connecting"),
              ("the response of", "first byte"), ("the body of", "first byte"))
    # Without slots CPython would make a table for each entry, as it has more than 30 attributes.
    __slots__ = """
        address peer request_id method path caller agent call upstream context ticket hold queued
        held_up connect_ms gave_up started first_byte ended wall who all_ms first_ms status outcome
        cause reader usage picodollars priced passed paid redactions trace reasons""".split()

    def __init__(self, address: str, peer: str):
        """`peer` is where the connection comes from, `address` who that stands for."""
        self.address = address
        self.peer = peer
        self.request_id = self.method = self.path = self.caller = self.call = self.hold = None
        self.agent = None       # what the client calls itself
        self.upstream = None    # name of the upstream
        self.context = self.ticket = None  # while it runs
        self.queued = None      # milliseconds in line; None where there was none
        self.held_up = 0.0      # seconds before the first byte that others took, such as the queue
        self.connect_ms = None  # time to connect; None for a spare connection
        self.gave_up = False    # the caller's own deadline was over
        self.started = self.first_byte = None  # monotonic seconds, as is `ended`
        self.who = ""           # caller, or address of an unknown one; set at the end
        self.all_ms = 0         # milliseconds to the end
        self.first_ms = None    # milliseconds to the first byte, None without one
        self.status = 0
        self.outcome = "ok"
        self.cause = self.reader = self.usage = None
        self.picodollars = 0
        self.priced = None      # whether the price is known; None where nothing was used
        self.passed = 0         # bytes of body sent to the caller
        self.paid = None        # a future, done when it is known whether it has paid a bill alone
        self.redactions = None  # {kind of redacted value: count}; None without any
        self.trace = None       # if traces are on
        self.reasons = ()       # with a trace: why the model stopped

    def __repr__(self) -> str:
        return f"<Entry {self.request_id} {self.method} {self.path} {self.outcome}>"

    def close(self, clock: Any) -> "Entry":
        """Notes the end of the call, and drops what is large and not needed any more."""
        self.ended = clock.monotonic()
        self.wall = clock.time_ns()
        started = self.started
        if started is None:
            self.started = started = self.ended  # no head ever came
        caller = self.caller
        self.who = caller.label if caller else self.address
        self.all_ms = int((self.ended - started) * 1000)
        if self.first_byte is not None:
            self.first_ms = int((self.first_byte - started) * 1000)
        self.reader = self.context = self.ticket = None
        call = self.call
        if call:
            call.on_made = None  # it holds the entry
            if call.large or call.made or call.masks:
                call.drop()
        return self

    @property
    def redacted(self):
        """The counts of redacted values, such as email=2,card=1."""
        return ",".join(["%s=%d" % row for row in self.redactions.items()])

    def as_row(self) -> Tuple:
        """Returns what the ledger keeps, by COLUMNS; usage is 0 where there was no answer."""
        call = self.call
        hold = self.hold
        usage = self.usage or NO_USAGE
        prompt, output, cached, cache_write, reasoning, estimated = usage[:6]
        caller = self.caller
        served = usage.model and usage.model[:80] or call and call.upstream_model
        asked = (  # two tuples: CPython makes one of more than 30 item by item
            self.request_id, self.wall / 1e9, self.who, self.address, self.method,
            self.path and self.path[:200], call and call.dialect.name,
            call and clean(call.model), clean(served), self.upstream,
            self.status, self.outcome, self.cause, bool(call and call.stream))
        return asked + (
            prompt, cached, cache_write, output, reasoning, estimated,
            self.picodollars / PICODOLLARS, self.picodollars,
            self.priced is False,
            hold and hold.held, hold and hold.describe_charges(),
            self.first_ms, self.all_ms, self.passed,
            self.queued, caller and caller.team, caller and caller.tag, self.agent,
            self.connect_ms, self.redacted if self.redactions else None)

    def as_fields(self) -> JsonObject:
        """Returns the row by the names of its columns."""
        return dict(zip(COLUMN_NAMES, self.as_row()))

    def state(self) -> str:
        """Returns where a running call stands."""
        if self.first_byte is not None:
            return "streaming"
        awaits = self.context.what if self.context else ""
        return next((state for begin, state in self.STATES if awaits.startswith(begin)), "reading")

    def as_running(self, clock: Any) -> JsonObject:
        """Returns what the page shows while it runs; `key` is no other one's, though callers may
        choose one id twice."""
        self.request_id = self.request_id or new_request_id(clock)
        call, caller, reader, ticket = self.call, self.caller, self.reader, self.ticket
        seconds = clock.monotonic() - self.started
        return {"id": self.request_id, "key": self.started, "state": self.state(),
                "position": ticket.queue.position(ticket) if ticket else None,
                "upstream": self.upstream, "caller": caller.label, "team": caller.team,
                "model": clean(call.model), "stream": bool(call.stream),
                "tokens": int(reader.most_characters()) // CHARACTERS_PER_TOKEN
                if reader else 0,
                "seconds": round(seconds, 3), "started": wall_time(clock) - seconds}

    def charged(self, nothing):
        """Returns what was taken of the tightest bucket, and what it holds."""
        tightest = self.hold and self.hold.tightest
        if not tightest:
            return nothing, nothing
        level, _, rule, _, amount, _ = tightest
        left = max(0, level)
        return (format_usd(amount), format_usd(left)) if rule.unit == USD else (amount, left)

    def as_dict(self):
        """Returns LOG_FIELDS: the row, but with None where nothing was counted."""
        fields = self.as_fields()
        fields["time"] = format_moment(self.wall // 10 ** 6)
        fields["model"] = fields["model"] and fields["model"][:80]
        fields["usd"] = format_usd(self.picodollars) if self.priced else None
        fields["cost"], fields["remaining"] = self.charged(None)
        if self.usage is None:
            fields.update(input=None, output=None, estimated=None)
        return {name: fields[name] for name in LOG_FIELDS}

    def as_text(self):
        """Returns one line of printable ASCII, whatever the caller has sent; ~ marks an
        estimate."""
        call, usage = self.call, self.usage
        first = "-" if self.first_byte is None else f"{self.first_ms}ms"
        cost, left = self.charged("-")
        used = usd = remarks = ""
        if usage:
            mark = "~" * usage.estimated
            used = f" in={mark}{usage.input} out={mark}{usage.output}"
        if self.priced:
            usd = " usd=" + format_usd(self.picodollars)
        if self.queued or self.cause or self.redactions:
            remarks = self.remarks()
        return (
            f"{format_moment(self.wall // 10 ** 6)} {self.who} "
            f"{self.method or '-'} {(self.path or '-')[:200]} {one_word(call and call.model)} "
            f"{self.status} {self.outcome} "
            +  # CPython makes a text of more than 30 parts part by part
            f"{'stream' if call and call.stream else '-'} first={first} "
            f"all={self.all_ms}ms cost={cost} left={left}{used}{usd} "
            f"bytes={self.passed} upstream={self.upstream or '-'} "
            f"id={self.request_id or '-'}{remarks}")

    def remarks(self):
        queue = f" queue={self.queued}ms" if self.queued else ""
        cause = " cause=" + self.cause.replace(" ", "_") if self.cause else ""
        return queue + cause + (f" redacted={self.redacted}" if self.redactions else "")


class Writer:
    """A thread that writes what others queue. What does not fit is dropped and counted, so nobody
    waits."""
    ROOM = 10_000
    PAUSE = 0.25  # seconds between two batches: they cost less than one by one
    dropped = 0   # since the start

    def __init__(self, name: str):
        self.queue = deque()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.run, name=name, daemon=True)

    def __repr__(self) -> str:
        return f"<{self.thread.name}: {len(self.queue)} queued, {self.dropped} dropped>"

    def record(self, item: Union[str, JsonObject, Sequence]):
        if len(self.queue) >= self.ROOM:
            self.dropped += 1
        else:
            self.queue.append(item)

    def take(self, most):
        """Returns what has waited longest."""
        return [self.queue.popleft() for _ in range(min(len(self.queue), most))]

    def run(self):
        while not self.stop.wait(self.PAUSE):
            self.write_queued()
        self.write_queued()

    def close(self, wait: float):
        """Writes what is queued, for up to `wait` seconds."""
        self.stop.set()
        if self.thread.ident:
            self.thread.join(wait)


def message_line(text: str, as_json: bool, clock: Any) -> str:
    """Returns a line of the log that tells of no call."""
    moment = format_moment(clock.time_ns() // 10 ** 6)
    return json.dumps({"time": moment, "message": text}) if as_json else f"{moment} {text}"


def is_split(stream):
    """Returns whether large writes may be mixed with those of other processes."""
    with suppress(AttributeError, OSError):  # not each stream has a file
        mode = os.fstat(stream.fileno()).st_mode
        return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


def whole_lines(data):
    """Returns how many bytes, in whole lines, can be written at once without mixing with other
    writers of the same pipe."""
    if len(data) <= PIPE_BUF:
        return len(data)
    return bytes(data[:PIPE_BUF]).rfind(b"\n") + 1 or bytes(data).index(b"\n") + 1


class Log(Writer):
    """Lines on stderr."""
    PAUSE = 0.05
    BATCH = 200  # lines: after each write this thread must wait for the interpreter again
    LONGEST = 3000  # characters of what one of several processes says: it fits in PIPE_BUF
    QUIET_SECONDS = 60
    told = 0    # how many of the dropped ones are told of
    cut = False  # whether the last line was not written to its end

    def __init__(self, stream: BinaryIO, as_json: bool, clock: Any = time, speaker: str = ""):
        """`stream` is unbuffered: a buffer has a lock, which a blocked writer would hold when the
        process ends. `speaker` begins all that is said, where several processes have one log."""
        super().__init__("log")
        self.speaker = speaker
        self.shared = bool(speaker) or is_split(stream)
        self.clock = clock
        self.stream = stream
        self.as_json = as_json
        self.quiet_until = {}  # subject of a line -> monotonic seconds
        self.thread.start()

    def say(self, text: str, about: Optional[str] = None):
        """Queues a line; one a minute of what is said about the same thing."""
        now = self.clock.monotonic()
        if about is None or now >= self.quiet_until.get(about, 0):
            self.quiet_until[about] = now + self.QUIET_SECONDS
            self.record(self.message(text))

    def message(self, text):
        if self.speaker and len(text) > self.LONGEST:
            text = "%s ... %s" % (text[:self.LONGEST // 2], text[-self.LONGEST // 2:])
        return message_line(self.speaker + text, self.as_json, self.clock)

    def report(self):
        """Queues the traceback of the exception being handled: a bug of ours."""
        self.say(traceback.format_exc().rstrip())

    def write_queued(self):
        while self.queue:
            lines = self.take(self.BATCH)
            untold = self.dropped - self.told
            if untold:
                lines.append(self.message(f"{untold} log lines dropped"))
            left = self.write("\n".join(lines + [""]))
            if left:
                self.dropped += left - bool(untold)
            else:
                self.told += untold

    def write(self, text):
        """Returns how many lines could not be written. A full disk may take half a line."""
        data = ("\n" * self.cut + text).encode("ascii", "backslashreplace")
        if data.translate(None, SEEN):  # faster than a regular expression
            data = visible(data.decode("ascii")).encode("ascii")
        data = whole = memoryview(data)
        try:
            while data:
                written = self.stream.write(data[:whole_lines(data)] if self.shared else data)
                # None: a pipe that does not block, and is full
                if written is None and self.stop.wait(self.PAUSE):
                    break
                data = data[written or 0:]
        except (OSError, ValueError):
            pass  # a closed or full log is no reason to stop serving
        left = bytes(data).count(b"\n")
        if len(data) == len(whole):
            return left - self.cut
        self.cut = whole[len(whole) - len(data) - 1] != ord("\n")
        return left


class UsageLog(Log):
    """The rows of the ledger as JSON lines in a file."""
    moved = False

    def __init__(self, path: str):
        """'-' is stdout. Raises ConfigFaults."""
        self.path = path
        file = 1 if path == "-" else path
        try:
            stream = open(file, "ab", buffering=0, closefd=path != "-")
        except OSError as failure:
            raise ConfigFaults(
                f"USAGE_LOG must be a file that can be written: {failure}") from None
        super().__init__(stream, as_json=True)
        self.shared = True  # it may be the same file for all

    def record(self, entry: Entry):
        super().record(json.dumps(entry.as_fields()))

    def reopen(self):
        """Opens the file anew, as somebody may have moved the old one."""
        self.moved = self.path != "-"

    def write(self, text):
        if self.moved:
            self.moved = False
            with suppress(OSError):
                stream = open(self.path, "ab", buffering=0)
                self.stream.close()
                self.stream = stream
        return super().write(text)

    def run(self):
        super().run()
        self.stream.close()


WAIT_SECONDS = 5  # wait for another process that writes the database
Levels = Dict[BucketKey, Tuple[int, float]]  # level, and wall-clock time of the last refill
KeyRecords = Dict[str, Tuple[float, str]]  # name of a key -> when it was changed, and all of it


class DatabaseFault(Exception):
    """Why a file cannot be the database: it is something else."""


class Unwritable(DatabaseFault):
    """The file or its folder cannot be read or written."""

    def __init__(self, path: str, failure: Exception):
        super().__init__("DATABASE must be a file that can be read and written, or off"
                         f" (got '{path}': {getattr(failure, 'strerror', None) or failure})")


class InUse(DatabaseFault):
    """Another process has it, now or for all its life; a later try may do."""


class NothingRecorded(DatabaseFault):
    """There is nothing to read yet."""


def exact_total(name):
    """Returns an expression for the sum of a column, as an integer: SQLite's sum() fails where it
    is too large, and its total() rounds; money needs more digits than counts."""
    if name == "picodollars":
        return ("CAST(min(total(picodollars / 1000000), 4e12) AS INTEGER) * 1000000"
                " + CAST(total(picodollars % 1000000) AS INTEGER)")
    return f"CAST(min(total({name}), 4e18) AS INTEGER)"


SUM_NAMES = ", ".join(SUM_KEYS)
SUM_KEY = f"start, {SUM_NAMES}"
SUM_TOTALS = ", ".join(f"{exact_total(name)} AS {name}" for name in SUM_COUNTS)
SUM_COLUMNS = ", ".join([SUM_KEY, *SUM_COUNTS, "first, last, slowest"])
# Adds up calls. Of each sum it tells last whether an upstream has answered one of them.
SUMS_OF_CALLS = """SELECT %s, %s, %s, min(rowid), max(rowid), max(coalesce(ms, 0)),
    max(outcome = 'ok' OR %s) FROM calls WHERE rowid > ? AND rowid <= ? GROUP BY %s""" % (
        START, ", ".join(SUM_KEYS.values()), ", ".join(map(exact_total, SUM_COUNTS.values())),
        " OR ".join(name + " > 0" for name in [*SUM_COUNTS][3:]),
        ", ".join(map(str, range(1, len(SUM_KEYS) + 2))))
# Adds such to the sums of a span: ON CONFLICT DO UPDATE is new in SQLite 3.24.
ADDED = ", ".join(f"min(new.{name} + coalesce(old.{name}, 0), {MOST})" for name in SUM_COUNTS)
ADD_TO_SUMS = f"""INSERT OR REPLACE INTO sums WITH few({SUM_COLUMNS}) AS (VALUES %s),
    new(span, {SUM_COLUMNS}) AS (SELECT {{0}}, {SUM_KEY}, {SUM_TOTALS}, min(first), max(last),
    max(slowest) FROM few GROUP BY {SUM_KEY}) SELECT span, {SUM_KEY}, {ADDED},
    min(new.first, coalesce(old.first, new.first)), max(new.last, coalesce(old.last, 0)),
    max(new.slowest, coalesce(old.slowest, 0))
    FROM new LEFT JOIN sums AS old USING (span, {SUM_KEY})"""
# What others are told of the time before, the latest first: quarters of the last day, else hours.
HISTORY = f"""SELECT {SUM_COLUMNS} FROM sums
    JOIN (SELECT max(start) AS today FROM sums WHERE span = {DAY})
    WHERE span = {HOUR} AND start < today OR span = {QUARTER} AND start >= today
    ORDER BY start DESC LIMIT 50000"""
# The last call stays, else its rowid would be given to another one, and so do those that are in no
# sum yet.
FORGET_CALLS = """DELETE FROM calls WHERE rowid IN (SELECT rowid FROM calls WHERE time < ? LIMIT %d)
    AND rowid < (SELECT max(rowid) FROM calls)
    AND rowid <= (SELECT value FROM facts WHERE name = 'summed')"""
FORGET_SUMS = """DELETE FROM sums WHERE span = {0}
    AND start < min(?, (SELECT min(start) FROM sums WHERE span = {0}) + 86400)"""
ENDS_OF_CALLS = "SELECT (SELECT min(rowid) FROM calls), (SELECT max(rowid) FROM calls)"


class SumNames:
    """Whose sums have names of their own. Beyond NAMES a quarter, callers and models that got no
    answer go by the name of `other`: whoever is refused may make up as many as they like. Beyond
    MOST_NAMES all do."""
    NAMES = 200
    MOST_NAMES = 2000

    def __init__(self):
        self.names = defaultdict(set)  # (quarter, kind of name) -> names

    def put(self, sums: Iterable[Sequence]) -> List[List[Union[int, str]]]:
        """Takes rows of SUMS_OF_CALLS; returns rows of SUM_COLUMNS."""
        if len(self.names) > 8:  # of quarters that are over
            self.names.clear()
        rows = []
        for start, caller, team, tag, model, *rest, answered in sums:
            most = self.MOST_NAMES if answered else self.NAMES
            caller = self.shown((start, "caller"), caller, most)
            model = self.shown((start, "model"), model, most)
            rows.append([start, caller, team, tag, model, *rest])
        return rows

    def shown(self, of, name, most):
        names = self.names[of]
        if len(names) < most:
            names.add(name)
        return name if name in names else "other"


SUM_TYPES = [int, *[str] * len(SUM_KEYS), *[int] * (len(SUM_COUNTS) + 3)]


def read_sum(text):
    """Returns a row of SUM_COLUMNS that another box tells, whose calls are not here. Raises
    ValueError."""
    row = json.loads(text)
    require(type(row) is list and list(map(type, row)) == SUM_TYPES and all(
        0 <= value <= MOST for value in row if type(value) is int), "is no sum")
    return [*row[:-3], MOST, 0, row[-1]]


def connect(path: str, mode: str) -> sqlite3.Connection:
    """Opens a database to read ("ro"), or also to write ("rw"). Raises sqlite3.Error."""
    path = os.path.abspath(path)
    if mode == "ro" and not os.path.exists(path + "-wal") and (
            not os.access(os.path.dirname(path), os.W_OK)):
        mode = "ro&immutable=1"  # nobody can write it, and SQLite could put nothing beside it
    connection = sqlite3.connect(
        f"file:{urllib.parse.quote(path)}?mode={mode}",
        timeout=WAIT_SECONDS, uri=True, isolation_level=None, check_same_thread=False)
    connection.text_factory = lambda text: text.decode("utf-8", "replace")
    return connection


def read_facts(execute: Callable[[str], "sqlite3.Cursor"]) -> Dict[str, int]:
    """Returns numbers, such as `summed`: the rowid of the last call that is in the sums."""
    return dict(execute("SELECT name, value FROM facts WHERE typeof(value) = 'integer'"))


def is_closed(execute: Callable[[str], "sqlite3.Cursor"]) -> bool:
    """Tells whether a key of a caller was stored: nobody else may call, for good."""
    return bool(list(execute("SELECT 1 FROM facts WHERE name = 'closed'")))


CLOSE_DOOR = "INSERT OR IGNORE INTO facts VALUES ('closed', 1)"


class Database:
    """The SQLite file of calls and bucket levels. A file that is not ours, or damaged, is never
    written to."""
    MOST_VALUES = 999           # of a statement, before SQLite 3.32
    APPLICATION = b"llmp"       # SQLite's application_id (fileformat2, 1.3.9)
    MOST_ROWS = 400             # of a statement, less than SQLite's most arms of a compound one
    BATCH = 5000                # calls that are added up at once
    FORGOTTEN = 500             # calls that are removed at once
    MOST_UNTOLD = 100_000       # sums that wait until others can be told
    TELL = "INSERT INTO untold(sum) VALUES %s"
    SCHEMA = """PRAGMA application_id = 0x%s;
        CREATE TABLE IF NOT EXISTS calls (%s);
        CREATE INDEX IF NOT EXISTS calls_time ON calls (time);
        CREATE TABLE IF NOT EXISTS buckets (rule TEXT, subject TEXT, level INTEGER, since REAL,
        PRIMARY KEY (rule, subject));
        CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value BLOB);
        CREATE TABLE IF NOT EXISTS things (name TEXT PRIMARY KEY, owner TEXT, upstream TEXT,
        address TEXT);
        CREATE TABLE IF NOT EXISTS keys (name TEXT PRIMARY KEY, role TEXT, team TEXT, created REAL,
        expires REAL, disabled INTEGER, models TEXT, upstream TEXT, limits TEXT, tag TEXT,
        note TEXT, last_used REAL, subject BLOB, redact TEXT);
        CREATE TABLE IF NOT EXISTS secrets (digest BLOB PRIMARY KEY, name TEXT, valid_until REAL);
        CREATE TABLE IF NOT EXISTS orders (id INTEGER PRIMARY KEY, caller TEXT, unit TEXT,
        amount INTEGER, until REAL, done INTEGER);
        CREATE TABLE IF NOT EXISTS audit (id INTEGER PRIMARY KEY,
        time REAL DEFAULT ((julianday('now') - 2440587.5) * 86400), who TEXT, role TEXT,
        address TEXT, what TEXT, target TEXT, detail TEXT);
        CREATE TABLE IF NOT EXISTS sums (span INTEGER, start INTEGER, %s, %s, first INTEGER,
        last INTEGER, slowest INTEGER, PRIMARY KEY (span, start, %s)) WITHOUT ROWID;
        CREATE TABLE IF NOT EXISTS untold (id INTEGER PRIMARY KEY AUTOINCREMENT, sum TEXT)""" % (
            APPLICATION.hex(), ", ".join(map(" ".join, COLUMNS)),
            ", ".join(name + " TEXT" for name in SUM_KEYS),
            ", ".join(name + " INTEGER" for name in SUM_COUNTS), SUM_NAMES)
    # Read the pages that the next rows go to. SQLite finds damage in any page that it reads, and
    # rolls back, so the others can wait until they are needed.
    PROBES = """SELECT rule, subject, level, since FROM buckets ORDER BY rule, subject;
        SELECT max(time) FROM calls;
        SELECT * FROM calls ORDER BY rowid DESC LIMIT 1;"""

    connection: Optional[sqlite3.Connection] = None
    facts: Dict[str, int] = {}  # known where it can be written
    tells = False               # other boxes of these sums

    def __init__(self, path: str, lock: Optional[BinaryIO] = None, reading: bool = False,
                 shared: bool = False):
        """`lock` as `lock_for_service` has it. `shared`: other processes write calls, too, and the
        levels of buckets are not here. Raises DatabaseFault."""
        self.path = path
        self.lock = lock
        self.reading = reading
        self.shared = shared
        self.names = SumNames()
        is_new = not os.path.exists(path) or not os.path.getsize(path)
        if is_new and reading:
            raise NothingRecorded(f"no calls are recorded in {path} (DATABASE)")
        try:
            if not is_new:
                self.check()
            if reading:
                self.connection = connect(path, "ro")
            else:
                os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # it tells who called what
                self.connection = connect(path, "rw")
                self.prepare()
                self.identity = self.file_identity()
        except (OSError, sqlite3.Error) as failure:
            if self.connection:
                self.connection.close()
            if "locked" in str(failure):
                raise InUse(f"DATABASE {path} is locked by another process") from None
            raise Unwritable(path, failure) from None

    def execute(self, statement: str, values: Sequence[Any] = ()) -> List[Tuple[Any, ...]]:
        """Returns all rows that a statement brings: PyPy keeps one open that has more."""
        return self.connection.execute(statement, values).fetchall()

    def close(self):
        self.connection.close()
        if self.lock:
            self.lock.close()

    def file_identity(self):
        """Returns what tells this file, and its lock, from others of their names; None where one
        is not there."""
        names = [self.path, self.lock.name] if self.lock else [self.path]
        with suppress(OSError):
            return [(one.st_dev, one.st_ino) for one in map(os.stat, names)]

    def check(self):
        """Raises DatabaseFault for a file that is not ours, damaged, or has other columns. By a
        connection that cannot write: closing another one writes what a crash left beside it."""
        with open(self.path, "rb") as file:
            if file.read(72)[68:] != self.APPLICATION:
                raise DatabaseFault(
                    f"{self.path} is not a database of llm_proxy; it was left as it is")
        with closing(connect(self.path, "ro")) as connection:
            try:
                columns = tuple(row[1] for row in connection.execute("PRAGMA table_info(calls)"))
                connection.executescript(self.PROBES)
            except sqlite3.DatabaseError as failure:
                if "unable to open" in str(failure) or "locked" in str(failure):
                    raise
                columns = ()
        if not columns or columns != COLUMN_NAMES[:len(columns)]:
            raise DatabaseFault(
                f"{self.path} is damaged, or of another version; it was left as it is")

    def prepare(self):
        """Makes the tables, or adds the columns that an older file lacks."""
        execute = self.execute
        with self.transaction():
            for statement in self.SCHEMA.split(";"):
                execute(statement)
            for table, columns in ("calls", COLUMNS), ("keys", [("redact", "TEXT")]):
                present = {row[1] for row in execute(f"PRAGMA table_info({table})")}
                for name, kind in columns:
                    if name not in present:
                        execute(f"ALTER TABLE {table} ADD COLUMN {name} {kind}")
            if execute("SELECT 1 FROM facts WHERE name = 'rolled' OR name = 'unsummed' AND value"):
                execute("DELETE FROM sums")  # of an older version, which made them otherwise
                execute("DELETE FROM facts WHERE name IN ('rolled', 'unsummed', 'summed')")
            execute("INSERT OR IGNORE INTO facts VALUES ('summed', 0)")
            self.facts = read_facts(execute)
        execute("PRAGMA journal_mode = WAL")
        execute("PRAGMA synchronous = NORMAL")
        with suppress(sqlite3.Error):  # for an old file's a disk may be too full: it goes without
            execute("CREATE INDEX IF NOT EXISTS calls_id ON calls (id)")

    def make_room(self):
        """Makes SQLite move what was written to its place, from now on soon: it puts up to 4 MB
        beside the file first (https://www.sqlite.org/wal.html), which may be all that a disk
        has. Raises sqlite3.Error; what was written then would take the room that this needs."""
        self.connection.rollback()
        self.execute("PRAGMA wal_autocheckpoint = 64")
        self.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def transaction(self):
        """Begins one; returns what ends it, as a with-block."""
        self.connection.rollback()  # Python 3.9 leaves one open whose COMMIT failed
        self.execute("BEGIN IMMEDIATE")
        return self.connection

    def insert(self, statement, rows, *values):
        """Executes a statement for many rows, a few dozen at a time: after each execution this
        thread must wait for the interpreter again. `values` are the parameters before the rows."""
        width = len(rows[0]) if rows else 1
        marks = "(%s)" % ",".join("?" * width)
        most = min((self.MOST_VALUES - len(values)) // width, self.MOST_ROWS)
        for start in range(0, len(rows), most):
            batch = rows[start:start + most]
            self.execute(statement.replace("%s", ",".join([marks] * len(batch))),
                         [*values, *chain.from_iterable(batch)])

    def add(self, rows: Sequence[Tuple]):
        """Inserts calls. What is the same in all of them is given once, because each value costs
        more than its place in the row."""
        same, names, columns = {}, [], []
        for name, column in zip(COLUMN_NAMES, zip(*rows)):
            if name != "id" and column.count(column[0]) == len(column):
                same[name] = column[0]
            else:
                names.append(name)
                columns.append(column)
        self.insert("INSERT INTO calls (%s) SELECT %s* FROM (VALUES %%s)" % (
            ", ".join([*same, *names]), "?, " * len(same)), list(zip(*columns)), *same.values())

    # -- sums

    def add_new(self):
        """Adds some calls to the sums that came since the last time; returns whether there were
        any."""
        summed = self.facts["summed"]
        (last,), = self.execute("SELECT coalesce(max(rowid), 0) FROM calls")
        last = min(last, summed + self.BATCH)
        if last > summed:
            sums = self.names.put(self.execute(SUMS_OF_CALLS, (summed, last)))
            self.add_sums(sums, {"summed": last}, sums if self.tells else ())
        return last > summed

    def add_sums(self, sums, facts, untold):
        """Adds to the sums, with those that other boxes are to be told."""
        with self.transaction():
            for span in SPANS:
                self.insert(ADD_TO_SUMS.format(span), [
                    (row[0] // span * span, *row[1:]) for row in sums])
            if untold:
                self.insert(self.TELL, [[json.dumps(row)] for row in untold])
                self.execute("DELETE FROM untold WHERE id <= (SELECT id FROM untold "
                             "ORDER BY id DESC LIMIT 1 OFFSET ?)", (self.MOST_UNTOLD,))
            self.note(**facts)
        self.facts.update(facts)

    def note(self, **facts):
        self.connection.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", facts.items())

    # -- what boxes tell each other of sums

    def untold(self, most: int) -> List[Tuple[int, str]]:
        """Returns sums that the others have yet to be told, with a number each."""
        return self.execute("SELECT id, sum FROM untold ORDER BY id LIMIT ?", (most,))

    def begin_to_tell(self):
        """Begins to tell other boxes the sums that are added from now on, and, the first time,
        those of the time before. Numbers of sums never repeat, not even with a new file in the
        place of this one."""
        execute = self.execute
        with self.transaction():
            if not execute("SELECT 1 FROM sqlite_sequence WHERE name = 'untold'"):
                execute("INSERT INTO sqlite_sequence VALUES ('untold', 0)")
                self.insert(self.TELL, [[json.dumps(row)] for row in execute(HISTORY)])
            execute("UPDATE sqlite_sequence SET seq = max(seq, CAST((julianday('now') - 2440587.5) "
                    "* 86400000 AS INTEGER)) WHERE name = 'untold'")
        self.tells = True

    def add_heard_sums(self, sums: Iterable[Tuple[str, int, bytes]], moment: int, last_told: int):
        """Adds what other boxes told up to a moment, each sum once, and forgets what they were
        told up to this number. A sum is (box, its number there, text)."""
        rows, facts = [], {"heard": moment}
        for box, number, text in sums:
            name = "heard of " + box
            if number > facts.get(name, self.facts.get(name, 0)):
                facts[name] = number
                with suppress(ValueError, RecursionError):
                    rows.append(read_sum(text))
        if len(facts) > 1:
            self.add_sums(rows, facts, ())
        self.execute("DELETE FROM untold WHERE id <= ?", (last_told,))

    def save(self, changed, gone):
        if self.shared:
            return
        execute = self.connection.executemany
        execute("DELETE FROM buckets WHERE rule = ? AND subject = ?", map(self.spell_key, gone))
        execute("INSERT OR REPLACE INTO buckets VALUES (?, ?, ?, ?)", [
            (*self.spell_key(key), max(-1 << 62, level), since)
            for key, (level, since) in changed])

    @staticmethod
    def spell_owners(keys):
        """Returns callers' keys as text: "key=HEX address=IP"."""
        return " ".join(
            "%s=%s" % (kind, name.hex() if kind == "key" else name) for kind, name in keys)

    @staticmethod
    def read_owners(text):
        """Raises ValueError, TypeError or AttributeError for what somebody else has written."""
        return [(kind, bytes.fromhex(name) if kind == "key" else name)
                for kind, _, name in (part.partition("=") for part in text.split())]

    def spell_key(self, key):
        """Returns the rule's text, and whose bucket it is."""
        return key[0], self.spell_owners(key[1:])

    def levels(self) -> Levels:
        """Returns what was saved."""
        levels = {}
        for rule, subject, level, since in () if self.shared else self.execute(
                "SELECT * FROM buckets"):
            # What somebody else has written is as good as a full bucket.
            with suppress(ValueError, TypeError, AttributeError):
                levels[(rule, *self.read_owners(subject))] = int(level), float(since)
        return levels

    def add_things(self, things, most):
        """Inserts things, and removes those that are None and the oldest above `most`."""
        things = dict(things).items()  # of each the last
        self.connection.executemany("DELETE FROM things WHERE name = ?", [
            (name,) for name, thing in things if not thing])
        self.connection.executemany("INSERT OR IGNORE INTO things VALUES (?, ?, ?, ?)", [
            (name, self.spell_owners([thing.owner]), thing.upstream, thing.address)
            for name, thing in things if thing])
        self.execute(
            "DELETE FROM things WHERE rowid <= (SELECT max(rowid) FROM things) - ?", (most,))

    def things(self) -> Dict[str, Thing]:
        """Returns what was saved, oldest first."""
        things = {}
        for name, owner, *place in self.execute(
                "SELECT name, owner, upstream, address FROM things ORDER BY rowid"):
            with suppress(ValueError, TypeError, AttributeError, IndexError):
                things[name] = Thing(self.read_owners(owner)[0], *place)
        return things

    def secret(self) -> bytes:
        """Returns a random secret of this file's own. Raises ValueError where it has none, and can
        only be read."""
        if not self.reading:
            self.execute("INSERT OR IGNORE INTO facts VALUES ('secret', ?)", (os.urandom(32),))
        (secret,), = self.execute("SELECT value FROM facts WHERE name = 'secret'")
        return bytes(secret)

    def key_rows(self) -> Tuple[Any, ...]:
        """Returns (rows of keys, of their secrets, whether nobody else may call, names of upstreams
        that an admin has switched off), all of one moment; when a key was used last is left out."""
        execute = self.execute
        execute("BEGIN")
        with self.connection:
            return (execute(KEYS_QUERY.replace("last_used", "NULL")),
                    execute("SELECT digest, name, valid_until FROM secrets"),
                    is_closed(execute),
                    [name for name, in execute(
                        "SELECT substr(name, 10) FROM facts WHERE name LIKE 'disabled %'"
                        " AND value = 1")])

    def note_processes(self, count):
        """Writes how many processes share the limits, for a start while Redis is away."""
        if count != self.facts.get("processes", 0):
            self.note(processes=count)
            self.facts["processes"] = count

    def key_records(self):
        """Returns what other boxes must know of keys, also of those that were removed."""
        execute, records = self.execute, {}
        for audit in execute("SELECT max(time), who, role, address, what, target, detail FROM audit"
                             " WHERE what LIKE '% key' GROUP BY target"):
            name = audit[5]
            keys = execute(KEYS_QUERY.replace("subject", "hex(subject)").replace(
                "last_used", "NULL") + " WHERE name = ?", (name,))
            secrets = execute(
                "SELECT hex(digest), valid_until FROM secrets WHERE name = ?", (name,))
            records[name] = audit[0], json.dumps(
                [audit, [dict(zip(Key._fields, key)) for key in keys], secrets])
        return records

    def take_record(self, record):
        """Goes by what another box has made of a key, where that is newer than what is known here.
        Raises ValueError, TypeError or LookupError for what no box of ours has written."""
        (when, *words), keys, secrets = json.loads(record)
        _, _, _, what, name, _ = words
        require(set(map(type, words)) == {str} and what.endswith(" key"), "no record")
        execute = self.execute
        if execute("SELECT 1 FROM audit WHERE target = ? AND time >= ? AND what LIKE '% key'",
                   (name, float(when))):
            return
        with self.transaction():
            execute("UPDATE secrets SET name = NULL, valid_until = ? WHERE name = ?", (when, name))
            execute("DELETE FROM keys WHERE name = ?", (name,))
            for key in keys:
                self.put_key(key)
            for one, until in secrets:
                execute("INSERT OR REPLACE INTO secrets VALUES (?, ?, ?)", (
                    bytes.fromhex(one), name, until and float(until)))
            execute("INSERT INTO audit (time, who, role, address, what, target, detail)"
                    " VALUES (?, ?, ?, ?, ?, ?, ?)", (float(when), *words))

    def put_key(self, fields):
        """Inserts a key as another box has it, which may know more, or less, of one."""
        names = Key._fields[:-2]
        subject = bytes.fromhex(fields["subject"])
        key = read_key(*map({**fields, "subject": subject}.get, names))
        self.execute("INSERT INTO keys (%s) VALUES (%s)" % (
            ", ".join(names), ", ".join("?" * len(names))), key[:len(names)])
        if key.role == "caller":
            self.execute(CLOSE_DOOR)

    def note_use(self, used):
        """Writes when keys were used last: `used` is {name: time}."""
        for name, wall in used.items():
            self.execute(
                "UPDATE keys SET last_used = ? WHERE name = ? AND coalesce(last_used, 0) < ?",
                (wall, name, wall - 60))

    def take_orders(self, now):
        """Returns the orders that are open, which count as done from then on, and those done before
        that still hold."""
        execute = self.execute
        if not execute("SELECT 1 FROM orders LIMIT 1"):
            return []
        with self.transaction():
            orders = execute(  # and nothing that somebody else has written
                "SELECT * FROM orders WHERE (done = 0 OR until > ?) AND (unit IS NULL OR"
                " typeof(amount) || typeof(until) = 'integerreal') ORDER BY id", (now,))
            execute("DELETE FROM orders WHERE coalesce(until, 0) <= ?", (now,))
            execute("UPDATE orders SET done = 1 WHERE done = 0")
        return list(map(Order._make, orders))

    def forget(self, before: float, sums_before: float) -> bool:
        """Removes some of the calls, and of the sums, from before these wall-clock times; returns
        whether there may be more."""
        execute = self.connection.execute
        calls = execute(FORGET_CALLS % self.FORGOTTEN, (before,)).rowcount
        sums_before -= sums_before % DAY  # so that no hour is left of a day that is gone
        sums = [execute(FORGET_SUMS.format(span), (sums_before,)).rowcount for span in SPANS]
        return calls >= self.FORGOTTEN or any(sums)


class Sum(namedtuple("Sum", SUM_COUNTS)):
    """What calls came to."""
    __slots__ = ()

    @classmethod
    def of(cls, sums: Iterable["Sum"]) -> "Sum":
        """Returns the sum of several sums."""
        return reduce(cls.plus, sums, NO_SUM)

    def plus(self, other: Sequence[int], sign: int = 1) -> "Sum":
        return Sum._make([one + sign * more for one, more in zip(self, other)])

    def tokens(self) -> int:
        return self.input + self.output

    def as_dict(self) -> JsonObject:
        fields = self._asdict()
        fields["usd"] = format_usd(fields.pop("picodollars"))
        return fields

    def in_short(self) -> JsonObject:
        """Returns what charts show."""
        return {"calls": self.calls, "tokens": self.tokens(), "usd": format_usd(self.picodollars)}


NO_SUM = Sum(*[0] * len(SUM_COUNTS))


# How a cell begins that a spreadsheet would compute (https://owasp.org/www-community/attacks/
# CSV_Injection), also one that begins where some end cells, with ";".
FORMULA = re.compile("(^|;)(?=\\s*[=+@\uff0b\uff0d\uff1d\uff20-].|[\t\r\n])", re.DOTALL)


def csv_cell(value):
    """Returns a value as a cell that no spreadsheet computes and no terminal obeys."""
    if type(value) is not str:
        return value
    text = FORMULA.sub(r"\1'", value)
    return text if text.isprintable() else text.encode("unicode_escape").decode()


def csv_of(names: Sequence[str], rows: Iterable[Sequence[Union[int, float, str, None]]]) -> str:
    """Returns a table as CSV (RFC 4180, but with line ends of Unix)."""
    text = io.StringIO()
    cells = [list(map(csv_cell, row)) for row in rows]
    csv.writer(text, lineterminator="\n").writerows([names, *cells])
    return text.getvalue()


def read_time_zone(name: str, offset: str = "") -> datetime.tzinfo:
    """Returns the time zone of this name, or, where this machine does not know it, the one that is
    `offset` minutes east of UTC."""
    zone = time_zone(name)
    if zone is None and re.fullmatch("-?[0-9]{1,4}", offset) and abs(int(offset)) < 1440:
        zone = datetime.timezone(datetime.timedelta(minutes=int(offset)))
    return zone or datetime.timezone.utc


MAX_STEPS = 3000
STEP_SECONDS = {"quarter": QUARTER, "hour": HOUR, "day": DAY, "month": 28 * DAY}
Step = Tuple[int, int]  # from when to when


def whole_quarters(start: float, end: float) -> Tuple[int, int]:
    """Returns a range, widened to quarters."""
    return int(start // QUARTER * QUARTER), int(-(-end // QUARTER) * QUARTER)


def read_steps(step: str, start: float, end: float, zone: datetime.tzinfo) -> List[Step]:
    """Returns the quarters, hours, days or months of a range, which is widened to whole quarters.
    Days and months are those of `zone`; hours begin with its days, so the last one is shorter where
    clocks are changed by less than an hour. Raises BadRequest."""
    size = STEP_SECONDS.get(step)
    if not (size and 0 <= start < end < 1 << 33):
        raise BadRequest("A range of quarters, hours, days or months is needed")
    start, end = whole_quarters(start, end)
    if end - start > size * MAX_STEPS:
        raise BadRequest("The range has too many steps: ask for longer ones")
    day = date_in(zone, start)
    if step == "month":
        day = day.replace(day=1)
    begin = midnight(day, zone)
    begins = []
    while begin < end:
        day = day_after(day, step)
        following = midnight(day, zone)
        begins += range(begin, following, size if size < DAY else following - begin)
        begin = following
    edges = [start, *(at for at in begins if start < at < end), end]
    return list(zip(edges, edges[1:]))


def read_parts(low: int, high: int, sign: int = 1,
               spans: Tuple[int, ...] = SPANS) -> Iterator[Tuple[int, int, int, int]]:
    """Yields (length of spans, from, to, sign): the days that are next to a range, and the hours
    and quarters that are to be added at its ends, or taken away (-1). Where days begin within a
    quarter, all of it counts or nothing."""
    span, *shorter = spans
    first, last = [(at + span // 2) // span * span for at in (low, high)]
    if first < last:
        yield span, first, last, sign
    else:
        first = last = high
    for start, end in ((low, first), (last, high)) if shorter else ():
        if start < end:
            yield from read_parts(start, end, sign, shorter)
        elif end < start:
            yield from read_parts(end, start, -sign, shorter)


def call_fields(fields: JsonObject, number: Optional[int] = None) -> JsonObject:
    """Returns what pages are told of a call; `number` is its rowid."""
    shown = {"row": number, **fields}
    shown["usd"] = format_usd(shown.pop("picodollars") or 0)
    for name in ("stream", "estimated", "unpriced"):
        shown[name] = bool(shown[name])
    return shown


# By what calls are found: what the sums say where there may be some, and what each says of itself.
CALL_FILTERS = {
    **{name: (f"{name} IN (:{name}, 'other')", f"{value} = :{name}")
       for name, value in SUM_KEYS.items()},
    "outcome": ("CASE WHEN :outcome = 'limited' THEN limited"
                " WHEN :outcome IN ('ok', 'caller_gone') THEN calls - failed - limited"
                " ELSE failed END > 0", "outcome = :outcome"),
    "failed": ("failed > 0", FAILED),
    "id": ("", "id = :id"),
    "slow": ("slowest >= :slow", "ms >= :slow")}
FIND_ID = "SELECT rowid FROM calls WHERE id = :id ORDER BY rowid DESC LIMIT 100"
FIND_SUMS = """SELECT start, min(first), max(last) FROM sums WHERE span = %d AND start >= :low
    AND start < :high AND first < :before AND last >= :oldest AND %s
    GROUP BY start"""
ADD_SUMS = f"""WITH parts(part, span, low, high) AS (VALUES {{}})
    SELECT part, {{}} AS name, {SUM_TOTALS} FROM parts CROSS JOIN sums
    ON sums.span = parts.span AND start >= low AND start < high WHERE {{}} GROUP BY 1, 2"""
LAST_CALLS = """SELECT found.caller, time FROM (SELECT caller, max(last) AS last FROM sums
    WHERE span = 86400 GROUP BY caller) AS found CROSS JOIN calls ON calls.rowid = last"""


class LedgerReader(NamedTuple):
    """Answers what pages ask of a ledger, from any thread but the loop's. Each question has a
    connection of its own, so nothing is kept of a file that was replaced. `now`, in unix seconds,
    and `zone` are those of who asks. Raises sqlite3.Error."""
    path: str
    now: float = 0.0
    zone: datetime.tzinfo = datetime.timezone.utc

    LOOK = 60_000  # calls that one question looks at
    NAMED = 200    # groups; what is beyond goes by the name of `other`

    @contextmanager
    def ask(self):
        """Returns what executes a statement."""
        with closing(connect(self.path, "ro")) as connection:
            yield connection.execute

    # -- sums

    def add_up(self, by: str, steps: List[Step], filters: Texts) -> List[Dict[str, Sum]]:
        """Returns what each step comes to, by name, as far as there is something. A part that is
        added to one and taken away from the next is read once."""
        owners = defaultdict(list)  # of parts
        series = [{} for _ in steps]
        for step, sums in zip(steps, series):
            for *part, sign in read_parts(*step):
                owners[tuple(part)].append((sums, sign))
        for part, name, *totals in self.read_sums(by, list(owners), filters):
            for sums, sign in owners[part]:
                sums[name] = sums.get(name, NO_SUM).plus(totals, sign)
        return [{name: one for name, one in sums.items() if one.calls} for sums in series]

    def read_sums(self, by, parts, filters):
        """Yields (which part, whose, what it comes to)."""
        values = {name: filters[name] for name in SUM_KEYS if filters.get(name)}
        where = " AND ".join(f"{name} = :{name}" for name in values) or "1"
        if by not in SUM_KEYS:
            raise BadRequest("Sums are by caller, team, model, upstream or tag")
        rows = ", ".join("(%d, %d, %d, %d)" % (number, *part) for number, part in enumerate(parts))
        with self.ask() as execute:
            for number, *totals in execute(ADD_SUMS.format(rows, by, where), values):
                yield (parts[number], *totals)

    def totals(self, by: str, start: float, end: float,
               filters: Optional[Texts] = None) -> Dict[str, Sum]:
        """Returns sums of a range, which is widened to whole quarters."""
        return self.add_up(by, [whole_quarters(start, end)], filters or {})[0]

    def midnight(self, days=0):
        """Returns when a day began, so many days ago."""
        day = date_in(self.zone, self.now) - datetime.timedelta(days)
        return midnight(day, self.zone)

    def today(self) -> Dict[str, Sum]:
        """Returns the sums of callers since midnight."""
        return self.totals("caller", self.midnight(), self.now + 1)

    def days(self, caller: str, count: int = 30):
        """Returns {"at": midnight, **sum} for each of the last days of a caller."""
        steps = read_steps("day", self.midnight(count - 1), self.now + 1, self.zone)
        series = self.add_up("caller", steps, {"caller": caller})
        return [{"at": at, **sums.get(caller, NO_SUM).as_dict()}
                for (at, _), sums in zip(steps, series)]

    def hours(self) -> Dict[str, List[int]]:
        """Returns the tokens of the last 24 hours, oldest first, of each caller."""
        first = int(self.now // HOUR - 23) * HOUR
        steps = [(at, at + HOUR) for at in range(first, first + DAY, HOUR)]
        tokens = defaultdict(lambda: [0] * 24)
        for number, sums in enumerate(self.add_up("caller", steps, {})):
            for name, one in sums.items():
                tokens[name][number] = one.tokens()
        return tokens

    def usage(self, by: str, step: str, start: float, end: float,
              filters: Texts) -> JsonObject:
        """Returns groups, the most expensive first, their total, and a series of them. Raises
        BadRequest."""
        steps = read_steps(step, start, end, self.zone)
        series = self.add_up(by, steps, filters)
        groups = self.merge(series)
        if len(groups) > self.NAMED:
            self.name_few(series, {*list(groups)[:self.NAMED], "other"})
            groups = self.merge(series)
        return {
            "from": steps[0][0], "to": steps[-1][1], "step": step, "by": by,
            "groups": [{"name": name, **one.as_dict()} for name, one in groups.items()],
            "total": Sum.of(groups.values()).as_dict(),
            "series": [{"at": at, "groups": {name: one.in_short() for name, one in sums.items()}}
                       for (at, _), sums in zip(steps, series)]}

    @staticmethod
    def name_few(series, names):
        """Adds what is beyond these names to `other`, which is one of them."""
        for sums in series:
            for name in sums.keys() - names:
                sums["other"] = sums.pop(name).plus(sums.get("other", NO_SUM))

    @staticmethod
    def merge(series):
        """Returns the sum of each name, the most expensive first, then who used most tokens."""
        groups = {}
        for name, one in chain.from_iterable(sums.items() for sums in series):
            groups[name] = groups.get(name, NO_SUM).plus(one)
        return dict(sorted(groups.items(), key=lambda group: (
            -group[1].picodollars, -group[1].tokens(), group[0])))

    def of_callers(self) -> Tuple[Any, ...]:
        """Returns today's sums, the tokens of the last hours and when they called last, each by
        caller."""
        return self.today(), self.hours(), self.seen()

    def of_one(self, caller: str) -> Tuple[Any, ...]:
        """Returns the last 20 calls of a caller, and its days."""
        return self.calls(None, 20, {"caller": caller})["calls"], self.days(caller)

    def audit(self, before: Optional[int], limit: int) -> List[JsonObject]:
        """Returns who changed what, the latest first, from before the number of a row."""
        with self.ask() as execute:
            rows = execute("SELECT * FROM audit WHERE id < ? ORDER BY id DESC LIMIT ?",
                           (MOST if before is None else before, limit))
            names = [name for name, *_ in rows.description]
            return [dict(zip(names, row)) for row in rows]

    # -- calls

    def call(self, name: str) -> Optional[JsonObject]:
        """Returns the last call of this id."""
        calls = self.calls(None, 1, {"id": name})["calls"]
        return calls[0] if calls else None

    def seen(self) -> Dict[str, float]:
        """Returns when each caller called last."""
        with self.ask() as execute:
            return dict(execute(LAST_CALLS))

    def calls(self, before: Optional[int], limit: int, filters: Texts) -> JsonObject:
        """Returns a page of calls, the newest first, from before a rowid, and from where to go on,
        None at the end. A page may be short, or empty, and not the last: where it had to look at
        very many calls. Raises BadRequest."""
        values = {name: filters[name] for name in CALL_FILTERS if filters.get(name)}
        if not re.fullmatch("[0-9]{1,9}", values.get("slow", "0")):
            raise BadRequest("slow must be a number of milliseconds")
        conditions = [CALL_FILTERS[name] for name in values]
        where = " AND ".join(where for _, where in conditions) or "1"
        values["before"] = MOST if before is None else before
        with self.ask() as execute:
            if "id" in values:
                ranges = [(row, row) for row, in execute(FIND_ID, values)]
            elif conditions:
                ranges = self.find_ranges(
                    execute, values, " AND ".join(where for where, _ in conditions))
            else:
                ranges = self.all_calls(execute)
            rows, following = self.look(execute, ranges, values, where, limit)
        return {"calls": [call_fields(dict(zip(COLUMN_NAMES, row)), number)
                          for number, *row in rows], "next": following}

    @staticmethod
    def all_calls(execute):
        """Returns one range of rowids."""
        (first, last), = execute(ENDS_OF_CALLS)
        return [(first or 0, last or 0)]

    def find_ranges(self, execute, values, where):
        """Yields ranges of rowids, those that end last first, in which there may be calls that
        match: those that are in no sum yet, then hours, as the sums say. Where a clock was set
        back, these may overlap."""
        def find(span, low, high):
            return [(-last, first, span, start) for start, first, last in execute(
                FIND_SUMS % (span, where), {**values, "oldest": oldest, "low": low, "high": high})]

        (oldest, newest), = self.all_calls(execute)
        heap = [(-newest, read_facts(execute)["summed"] + 1, 0, 0), *find(DAY, 0, MOST)]
        heapq.heapify(heap)
        while heap:
            last, first, span, start = heapq.heappop(heap)
            if span != DAY:
                yield first, -last
            else:
                for one in find(HOUR, start, start + DAY):
                    heapq.heappush(heap, one)

    def look(self, execute, ranges, values, where, limit):
        """Returns rows that match, and where to go on."""
        query = (f"SELECT rowid, * FROM calls WHERE rowid BETWEEN :first AND :last AND {where}"
                 " ORDER BY rowid DESC LIMIT :limit")
        rows, before, left = [], values["before"], self.LOOK
        for first, last in ranges:
            last = min(last, before - 1)
            if first > last:
                continue
            lowest = max(first, last - left + 1)
            rows += execute(query, {**values, "first": lowest, "last": last,
                                    "limit": limit - len(rows)})
            if len(rows) == limit:
                return rows, rows[-1][0]
            before = lowest
            left -= last - lowest + 1
            if left <= 0:
                return rows, before
        return rows, None


KEYS_QUERY = "SELECT %s FROM keys" % ", ".join(Key._fields[:-2])


class Order(NamedTuple):
    """What the running proxy is to do with the buckets of a caller: let those of a unit hold so
    much more until then (seconds since 1970), or, without a unit, fill all."""
    id: int
    caller: str  # its label
    unit: Optional[str]
    amount: Optional[int]
    until: Optional[float]
    done: int


def read_keys(rows: Tuple[Any, ...], secret: bytes, closed: bool = False) -> StoredKeys:
    """Returns the keys of Database.key_rows()."""
    keys, secrets, is_closed, disabled = rows
    keys_read = []
    faults = []
    for row in keys:
        try:
            keys_read.append(read_key(*row))
        except (ValueError, TypeError):
            faults.append("the key %.80r in DATABASE cannot be read: it lets nobody in" % row[:1])
    good = [(one, name, until if type(until) in (int, float, type(None)) else 0.0)
            for one, name, until in secrets if type(one) is bytes]
    stored = StoredKeys(secret, keys_read, good, closed or is_closed)
    stored.rows = rows
    stored.disabled = disabled
    stored.faults = faults
    return stored


class KeyFault(ValueError):
    """Why something cannot be done with keys, in a sentence for the admin."""


class NoSuchKey(KeyFault):
    """None is stored by a name."""


def require_bucket(limits: Limits, callers: Iterable[Caller], unit: str):
    """Raises KeyFault if these callers have no bucket of a unit to which more could be given."""
    if not any(limits.own_buckets(one, unit) for one in callers):
        raise KeyFault(f"no rule counts {unit} for this caller alone: it was given nothing")


class Actor(NamedTuple):
    """Who does what the audit keeps."""
    who: str
    role: str
    address: str


class NewKey(NamedTuple):
    """A key that was made; its secret is told once. `closes`: from now on nobody else may call,
    unless PROXY_API_KEYS says so."""
    key: Key
    secret: str
    closes: bool = False

    def as_dict(self) -> JsonObject:
        return {"key": self.secret, **self.key.as_dict()}


class KeyStore(NamedTuple):
    """What can be done with stored keys: each in one transaction, with a row of the audit, which
    names the actor. A running proxy goes by it within a second. Fields are given as texts, as
    KEY_FIELDS has them, None or empty for none. Raises KeyFault, and sqlite3.Error."""
    connection: sqlite3.Connection
    clock: Any
    actor: Optional[Actor]  # None where nothing will be changed

    KEEP_SECONDS = 90 * 86400  # for so long an expired secret is not a stranger's
    COLUMNS = {"role": "coalesce(?, 'caller')", "expires": "created + ?"}

    @contextmanager
    def change(self, what, name, detail=""):
        """Begins one transaction, to which the row of the audit belongs."""
        execute = self.connection.execute
        execute("BEGIN IMMEDIATE")
        with self.connection:
            yield execute
            # Later than what another box has done to it, whose clock may be ahead.
            execute("INSERT INTO audit (time, who, role, address, what, target, detail)"
                    " SELECT max(?, coalesce(max(time) + 0.001, 0)), ?, ?, ?, ?, ?, ? FROM audit"
                    " WHERE target = ?", (self.now(), *self.actor, what, name, detail, name))

    def list(self) -> List[Key]:
        """Returns all that can be read, by name."""
        rows = self.connection.execute(KEYS_QUERY + " ORDER BY name")
        return list(read_keys((rows, (), False, ()), b"").keys.values())

    def find(self, name: str) -> Key:
        rows = list(self.connection.execute(KEYS_QUERY + " WHERE name = ?", (name,)))
        if not rows:
            raise NoSuchKey(f"no key is stored by the name {in_ascii(name)}")
        try:
            return read_key(*rows[0])
        except (ValueError, TypeError):
            raise KeyFault(f"the key {name} cannot be read: remove it, and add it anew") from None

    show = find

    def add(self, name: str, /, **fields: Optional[str]) -> NewKey:
        secret = new_secret()
        self.check_field("name", read_name, name)
        with self.change("add key", name, describe_fields(fields)) as execute:
            if list(execute("SELECT 1 FROM keys WHERE name = ?", (name,))):
                raise KeyFault(f"a key by the name {name} is stored already")
            execute("INSERT INTO keys (name, role, created, disabled, subject)"
                    " VALUES (?, 'caller', ?, 0, ?)", (name, self.now(), digest(secret)))
            execute("INSERT INTO secrets VALUES (?, ?, NULL)", (digest(secret), name))
            was_closed = is_closed(execute)
            key = self.write(execute, name, fields)
            return NewKey(key, secret, is_closed(execute) and not was_closed)

    def set(self, name: str, /, reset: bool = False, **fields: Optional[str]) -> Key:
        """Changes these fields; `reset`: its buckets are full then."""
        with self.change("set key", name, describe_fields(fields) + " reset" * reset) as execute:
            if reset:
                self.order(execute, name)
            return self.write(execute, name, fields)

    def disable(self, what: str, disabled: bool, name: str) -> Key:
        """Disables a key: it lets nobody in until it is restored."""
        with self.change(what, name) as execute:
            execute("UPDATE keys SET disabled = ? WHERE name = ?", (disabled, name))
            return self.find(name)

    revoke = partialmethod(disable, "revoke key", True)
    restore = partialmethod(disable, "restore key", False)

    def rotate(self, name: str, grace: Optional[str] = None) -> NewKey:
        """Gives it another secret; those before are good for the `grace`, such as 1h. All else
        stays."""
        secret = new_secret()
        now = self.now()
        until = now + (self.check_field("grace", age, grace) if grace else 0)
        with self.change("rotate key", name, f"grace {grace}" if grace else "") as execute:
            key = self.find(name)
            execute("UPDATE secrets SET valid_until = min(coalesce(valid_until, ?), ?)"
                    " WHERE name = ?", (until, until, name))
            execute("INSERT INTO secrets VALUES (?, ?, NULL)", (digest(secret), name))
            execute("DELETE FROM secrets WHERE valid_until < ?", (now - self.KEEP_SECONDS,))
        return NewKey(key, secret)

    def remove(self, name: str):
        """Forgets it: the books keep what it used, and its secrets are known as nobody's."""
        with self.change("remove key", name) as execute:
            if not execute("DELETE FROM keys WHERE name = ?", (name,)).rowcount:
                self.find(name)
            execute("UPDATE secrets SET name = NULL, valid_until = ? WHERE name = ?",
                    (self.now(), name))

    def give(self, name: str, amount: str, unit: str, seconds: Optional[str] = None):
        """Lets a caller's buckets of a unit hold so much more for a time, such as 1d, and adds
        that."""
        value = self.check_field("amount", lambda text: read_amount(text, unit), amount)
        length = seconds or "1d"
        until = self.now() + self.check_field("time", age, length)
        detail = f"{amount} {unit} for {length}"
        with self.change("give", name, detail) as execute:
            self.order(execute, name, unit, value, until)

    def reset(self, name: str):
        """Fills a caller's buckets."""
        with self.change("reset", name) as execute:
            self.order(execute, name)

    def switch_upstream(self, name: str, on: bool):
        """Notes whether an upstream is to be asked, for the next start."""
        with self.change("enable upstream" if on else "disable upstream", name) as execute:
            execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", ("disabled " + name, not on))

    # -- what these have in common

    def now(self):
        return wall_time(self.clock)

    def order(self, execute, name, unit=None, amount=None, until=None):
        execute("INSERT INTO orders (caller, unit, amount, until, done) VALUES (?, ?, ?, ?, 0)",
                (name, unit, amount, until))

    def write(self, execute, name, fields):
        """Changes fields; returns the key."""
        for field, text in fields.items():
            if field not in KEY_FIELDS:
                raise KeyFault(f"a key has no field {in_ascii(field)}")
            value = None if text in (None, "") else self.check_field(
                field, KEY_FIELDS[field].read, text)
            execute("UPDATE keys SET %s = %s WHERE name = ?" % (
                field, self.COLUMNS.get(field, "?")), (
                    value if field == "expires" else text or None, name))
        key = self.find(name)
        if key.role == "caller":
            execute(CLOSE_DOOR)
        return key

    @staticmethod
    def check_field(field, read, text):
        try:
            require(isinstance(text, str), "must be text")
            return read(text)
        except ValueError as fault:
            raise KeyFault(f"{field} {fault}") from None


def describe_fields(fields):
    return " ".join("%s=%s" % (field, text or "-") for field, text in fields.items())


def lock_name(path: str) -> str:
    """Returns the name of a database's lock, the same by whichever link the database is reached."""
    return os.path.realpath(path) + ".lock"


def lock_for_service(path: str, shared: bool = False) -> Optional[BinaryIO]:
    """Returns a file that is locked while it stays open, so that one service alone writes the
    levels of a database; commands may read it. `shared`: for one of its workers. Raises
    DatabaseFault. Windows has no such lock."""
    try:
        import fcntl
    except ImportError:
        return None
    try:
        file = open(lock_name(path), "ab", opener=lambda *how: os.open(*how, 0o600))
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        return file
    except BlockingIOError:
        file.close()
        raise InUse(f"DATABASE {path} is used by another llm_proxy that runs") from None
    except OSError as failure:
        raise Unwritable(path, failure) from None


def let_workers_in(lock: BinaryIO):
    """Opens a lock to other workers, which ask for it as such. Raises OSError."""
    import fcntl
    fcntl.flock(lock, fcntl.LOCK_SH)


def open_for_service(path: str, opening: Callable[..., Database] = Database,
                     shared: bool = False) -> Database:
    """Returns a database that no other service writes while it is open. Raises DatabaseFault."""
    lock = lock_for_service(path, shared)
    try:
        return opening(path, lock, shared=shared)
    except DatabaseFault:
        if lock:
            lock.close()
        raise


class Ledger(Writer):
    """One row per call, the levels of the buckets, and what upstreams store, in a database that may
    go and come back."""
    SAVE_SECONDS = 3  # between two calls of `save`
    FORGET_SECONDS = 600
    REOPEN_SECONDS = 60
    BATCH = 500          # calls
    SUMS_DAYS = 400
    SUM_SECONDS = 2
    forget_at = 0.0       # monotonic seconds, as are the others
    sum_at = 0.0
    reopen_at = 0.0
    trouble = ""          # why not all is written yet
    version = -1          # of the database, when keys were read
    done: Collection[Order] = ()  # orders that still hold and are carried out here
    # Where keys are shared: is told of all, in the ledger's thread, and hears of others' by what
    # is put into `records`.
    on_records: Optional[Callable[[KeyRecords], None]] = None
    records: Union[Tuple[()], "deque[str]"] = ()
    # ... and exchanges sums with others, in this thread, too.
    trade: Optional[Callable[[Database], bool]] = None

    def __init__(self, config: Config, database: Optional[Database], limits: Limits, stored: Stored,
                 clock: Any, log: Log, keys: StoredKeys, secret: bytes, worker: Optional[int]):
        """`secret` is what digests of keys are blinded by. Without a database that can be written
        one is looked for once in a while. `worker` is the number of one of several processes that
        have it, of which the first keeps the sums."""
        super().__init__("ledger")
        if database and database.reading:
            database.close()
            database = None
        self.database = database
        self.path = config.database
        self.limits = limits
        self.stored = stored
        self.clock = clock
        self.days = config.ledger_days
        self.log = log
        self.keys = keys
        self.secret = secret
        self.worker = worker
        # Is told of keys that were changed and of orders, in the ledger's thread.
        self.on_news = lambda keys, orders: None
        self.on_read = deque()  # are called there once both were read the next time
        # Buckets are as they were. Levels of rules that are no more go with the first `save`.
        self.saved = self.levels = database.levels() if database else {}
        ahead = limits.restore(self.saved, wall_time(clock))
        if ahead:
            log.say(
                f"{ahead} buckets were saved by a clock that was ahead: they are taken as of now")
        if database:
            for name, thing in database.things().items():
                stored.put(name, thing)
        else:
            self.reopen_at = clock.monotonic() + self.REOPEN_SECONDS

    def record(self, entry: Entry):
        """Queues a call's row, the name of its key, and its rules: waiting entries would crowd the
        processor's cache."""
        key = entry.caller and entry.caller.stored_key
        super().record((entry.as_row(), key and key.name,
                        entry.hold.keyed_rules if entry.hold else ()))

    def save(self, levels: Levels):
        """Hands over the level of each bucket that is not full, and never waits. The thread writes
        what changed, and deletes what is gone."""
        self.levels = levels

    def run(self):
        super().run()
        if self.database:
            self.database.close()

    def write_queued(self):
        """Writes what is there. What cannot be written stays in the queue until that is full."""
        now = self.clock.monotonic()
        while self.write_batch(now):
            if not self.queue:
                if self.trouble:
                    self.log.say("the database can be written again")
                self.trouble = ""
                if now >= self.sum_at and not self.worker:
                    self.add_up(now)
                return

    def write_batch(self, now):
        """Returns whether it went well. All at once might not fit on a disk with a little room."""
        batch = [self.queue[number] for number in range(min(len(self.queue), self.BATCH))]
        try:
            if not self.is_open(now):
                return False
            if "full" in self.trouble:
                self.database.make_room()
            self.read_news()
            rows, names, rules = zip(*batch) if batch else ((), (), ())
            self.write(rows, rules, now)
            self.note_use(dict(zip(names, rows)))
        except sqlite3.Error as failure:
            self.trouble = str(failure)
            return self.log.say(f"the database cannot be written: {failure}", "DATABASE")
        except Exception:
            self.log.report()  # then go on without these
            self.dropped += len(batch)
        for _ in batch:
            self.queue.popleft()
        return True

    def add_up(self, now):
        """Brings the sums up to date, a little at a time. After a failure it is done again."""
        database = self.database
        try:
            if self.trade and not database.tells:
                database.begin_to_tell()
            while database.add_new():
                if self.clock.monotonic() >= now + self.PAUSE or self.stop.is_set():
                    return  # calls are to be written, too
            more = self.trade and self.trade(database)
            self.sum_at = now if more else now + self.SUM_SECONDS
        except sqlite3.Error as failure:
            self.sum_at = now + 60
            self.log.say(f"the sums of calls cannot be written: {failure}")
        except Exception:
            self.sum_at = now + 60
            self.log.report()

    def is_open(self, now):
        """Opens the file again, or a new one, where it was deleted or replaced, or could not be
        written at the start."""
        if self.database and self.database.file_identity() != self.database.identity:
            self.log.say("DATABASE or its lock was deleted or replaced")
            self.database.close()
            self.database = None
        if self.database is None and now >= self.reopen_at:
            self.reopen_at = now + self.REOPEN_SECONDS
            try:
                self.database = open_for_service(self.path, shared=self.worker is not None)
                self.saved = {}
                self.version = -1
                if self.keys.closed:  # what a deleted file knew is no reason to let anyone in
                    self.database.execute(CLOSE_DOOR)
                self.log.say(f"calls and buckets are kept in {self.path}")
            except DatabaseFault as fault:
                self.log.say(f"calls and buckets are kept in memory only: {fault}")
                with suppress(DatabaseFault, sqlite3.Error), (
                        closing(Database(self.path, reading=True))) as database:
                    self.tell(database.key_rows(), ())
        return self.database is not None

    def read_news(self):
        """Looks at keys and orders, and tells those who asked before it looked."""
        asked = [self.on_read.popleft() for _ in range(len(self.on_read))]
        while self.records:
            self.version = -1
            with suppress(ValueError, TypeError, LookupError, AttributeError):
                self.database.take_record(self.records.popleft())
        self.look_at_keys()
        for tell in asked:
            tell()

    def look_at_keys(self):
        """Tells what others have changed of keys, and ordered. What cannot be read changes nothing:
        nobody is let in by that, and nobody shut out."""
        try:
            (version,), = self.database.execute("PRAGMA data_version")
            if version == self.version:
                return  # no other connection has written
            rows = self.database.key_rows()
            orders = self.new_orders()
            if self.on_records and (rows != self.keys.rows or self.version < 0):
                self.on_records(self.database.key_records())
        except sqlite3.Error as failure:
            return self.log.say(f"the keys in DATABASE cannot be read: {failure}", "DATABASE")
        self.version = version
        self.tell(rows, orders)

    def tell(self, rows, orders):
        """Tells of keys, where they were changed, and of orders."""
        if rows != self.keys.rows:
            self.keys = read_keys(rows, self.secret, self.keys.closed)
            for fault in self.keys.faults:
                self.log.say(fault)
        elif not orders:
            return
        self.on_news(self.keys, orders)

    def new_orders(self) -> List[Order]:
        """Returns the orders that are to be carried out here. The first of several workers that
        looks adds what is given, and the others must know of it."""
        orders = self.database.take_orders(wall_time(self.clock))
        new = [one for one in orders if one._replace(done=1) not in self.done]
        self.done = {one._replace(done=1) for one in orders if one.until}  # others are gone
        return new

    def note_use(self, last_rows):
        """Writes when keys were used, to the minute, and how many processes there are."""
        used = {name: row[TIME_COLUMN] for name, row in last_rows.items() if name}
        try:
            self.database.note_use(used)
            self.database.note_processes(self.limits.buckets.processes)
        except sqlite3.Error as failure:  # the calls need not be written again
            self.log.say(f"the keys in DATABASE cannot be written: {failure}", "DATABASE")

    def recent_levels(self, keyed_rules):
        """Returns the levels as they were saved last, but for buckets of calls that ended: what
        these took is not lost with the process."""
        keys = {key for each in keyed_rules for _, key in each}
        if not keys:
            return self.levels
        buckets = self.limits.buckets
        return {**self.levels, **buckets.as_saved(wall_time(self.clock), buckets.latest(keys))}

    def write(self, rows, keyed_rules, now):
        """Writes calls and levels, and removes old calls, in one transaction."""
        snapshot = self.levels
        levels = self.recent_levels(keyed_rules)
        saved = self.saved
        things = self.stored.unsaved.copy()
        if not (rows or things) and levels is saved and now < self.forget_at:
            return
        with self.database.transaction():
            self.database.add(rows)
            self.database.save(levels.items() - saved.items(), saved.keys() - levels.keys())
            if things:
                self.database.add_things(things, self.stored.ROOM)
            if now >= self.forget_at:
                self.forget_old(now)
        self.saved = levels
        for _ in things:
            self.stored.unsaved.popleft()
        if self.levels is snapshot:  # no newer one came meanwhile
            self.levels = levels

    def forget_old(self, now):
        now_wall = wall_time(self.clock)
        if not self.database.forget(
                now_wall - self.days * 86400, now_wall - max(self.days, self.SUMS_DAYS) * 86400):
            self.forget_at = now + self.FORGET_SECONDS

    def close(self, wait: float):
        """Writes what is queued, and the levels as they are now."""
        self.save(self.limits.buckets.snapshot(wall_time(self.clock)))
        super().close(wait)


class RefusalSums:
    """Counts refusals of admins and of callers without a known key. SHOWN at once, then one a
    second are written down like any call; of the others a line a second says how many: nobody can
    fill a disk by being refused."""
    SHOWN = 10
    until = -inf  # monotonic seconds
    shown = 0

    def __init__(self, log: Log):
        self.log = log
        self.counts = Counter()  # (status, address) -> refusals

    def counts_only(self, entry):
        """Returns whether a refusal is only counted here, and not written down."""
        if entry.ended >= self.until:
            self.report()
            passed = entry.ended - self.until + 1  # and whole seconds of that count
            self.shown = ceil(max(0, self.shown - passed))
            self.until = entry.ended + 1
        if self.shown < self.SHOWN:
            self.shown += 1
            return False
        self.counts[f"{entry.status} {entry.address}"] += 1
        return True

    def report(self):
        if self.counts:
            worst = ["%s x%d" % row for row in self.counts.most_common(5)]
            self.log.say("%d more were refused: %s" % (
                sum(self.counts.values()), ", ".join(worst)))
            self.counts.clear()


class Watcher:
    """A listener that Books tells of calls, on the loop: it must not wait."""
    counts_all = False  # hears also of refusals that are only counted

    def record(self, entry: Entry):
        """Hears that a call has ended; it is in the ledger, too."""

    def close(self, wait: float):
        """Hears that nothing more will come."""


class Books:
    """The log, the ledger and the usage log; each has a thread, so that none waits for another.
    `running` are the entries of calls that run, oldest first."""

    def __init__(self, log: Log, ledger: Optional[Ledger], usage_log: Optional[Log],
                 loop: Loop):
        self.loop = loop
        self.refusals = RefusalSums(log)
        self.log = log
        self.ledger = ledger
        self.usage_log = usage_log
        self.running = {}
        self.watch(())

    def open(self):
        """Begins to write the ledger: called when it is sure that this process will serve, because
        two must not write the same levels."""
        if self.ledger:
            self.ledger.thread.start()

    def watch(self, watchers: Sequence[Watcher]):
        """Adds listeners, each for the kinds of calls that it wants."""
        self.watchers = watchers
        listeners = [*filter(None, (self.ledger, self.usage_log)), *watchers]
        self.on_end = [one.record for one in listeners if type(one).record is not Watcher.record]
        self.on_count = [one.record for one in watchers if one.counts_all]

    def record(self, entry: Entry):
        """Notes that a request has ended; it is written down in the loop's next pass, with others
        that end now."""
        loop = self.loop
        if not loop.ended:
            loop.call_soon(loop.do_put_off)
        loop.ended.append((self.write_down, entry.close(self.log.clock)))

    def write_down(self, entry):
        call = entry.call
        try:
            if call:
                self.running.pop(entry, None)
            elif entry.outcome == "refused" and not (
                    entry.caller and entry.caller.role == "caller") and (
                        self.refusals.counts_only(entry)):
                for tell in self.on_count if entry.method else ():
                    tell(entry)
                return
            as_json = self.log.as_json
            self.log.record(json.dumps(entry.as_dict()) if as_json else entry.as_text())
            # A page is no call, nor is what had no head.
            if call or (entry.method and entry.outcome != "ok"):
                for tell in self.on_end:
                    tell(entry)
        except Exception:  # a bug here must not keep the other entries from being written
            self.log.report()

    def save(self, levels: Levels):
        """Hands the levels of buckets to the ledger; to be called every Ledger.SAVE_SECONDS."""
        self.refusals.report()
        if self.ledger:
            self.ledger.save(levels)

    def close(self, wait: float):
        self.loop.do_put_off()
        self.refusals.report()
        for part in filter(None, (self.ledger, self.usage_log, *self.watchers, self.log)):
            part.close(wait)


# --------------------------------------------------------------------------------------------------
# Signals: what is told of calls outside of the books, to monitors, collectors and whoever looks at
# the page: metrics, traces, warnings, and the feed of events. Nothing of it holds up a call; what
# goes out, to addresses that the operator set, goes by threads of their own.
# --------------------------------------------------------------------------------------------------

class Feed(Watcher):
    """Events, the last ROOM of them, as server-sent ones (WHATWG HTML 9.2), for pages that show
    what happens now. Each has a number, by which a page that was cut off goes on. While nobody
    looks, calls cost nothing here."""
    ROOM = 1000
    KEPT_SECONDS = 60  # a page that was cut off for longer begins anew
    PER_SECOND = 200  # events of calls; nobody can read more, and numbers come by the pulse
    told = 0          # of calls, in this second
    listeners = 0     # pages that are open
    kept = 0          # seconds for which events are kept yet
    closed = False

    def __init__(self, clock: Any):
        self.clock = clock
        self.number = clock.time_ns() // 10 ** 6  # above all that were before the last start
        self.events = deque(maxlen=self.ROOM)
        self.fresh = []  # those of calls that are yet to be added: name, what describes it

    def tell(self, name: str, payload: JsonObject):
        """Adds an event."""
        self.number += 1
        text = f"id: {self.number}\nevent: {name}\ndata: {json.dumps(payload)}\n\n"
        self.events.append(text.encode())

    def begin(self, entry):
        self.put_off("begin", partial(entry.as_running, self.clock))

    def record(self, entry):
        if (self.kept or self.listeners) and entry.call:
            self.put_off("end", lambda: {**call_fields(entry.as_fields()), "key": entry.started})

    def put_off(self, name, describe):
        """Keeps an event of a call for `tell_fresh`: to describe many together takes a third of
        the time."""
        self.told += 1
        if self.told <= self.PER_SECOND:
            self.fresh.append((name, describe))

    def tell_fresh(self):
        fresh, self.fresh = self.fresh, []
        for name, describe in fresh:
            self.tell(name, describe())

    def exchange(self, payload: JsonObject):
        """Tells other processes, where there are some, what was in a second."""

    def added_up(self, payload: JsonObject) -> JsonObject:
        """Returns what was in a second of all."""
        return payload

    def pulse(self, payload: JsonObject):
        """Tells what was in the second that is over."""
        self.tell_fresh()
        self.told = 0
        if self.listeners:
            self.kept = self.KEPT_SECONDS
            self.tell("pulse", payload)
        elif self.kept:
            self.kept -= 1
            if not self.kept:
                self.number += 1  # so that a page that comes back is told that it lost some
                self.events.clear()

    def close(self, wait):
        self.closed = True

    def since(self, number: int) -> bytes:
        """Returns the events after a number, or one that tells that some of them are forgotten."""
        self.tell_fresh()
        first = len(self.events) - (self.number - number)
        if 0 <= first <= len(self.events):
            return b"".join(islice(self.events, first, None))
        return b"event: lost\ndata: {}\n\n"


class Poster(Writer):
    """Posts JSON to a URL of the operator's, which may hold secrets: no line in the log shows it.
    What is not taken in a few tries is dropped and counted."""
    ROOM = 2048
    PAUSE = 1
    MOST = 1            # items of one body
    DELAYS = (0, 1, 5)  # seconds before each try
    SECONDS = 10        # to connect, to send and to be answered
    PASSING = "408 429 500 502 503 504".split()  # statuses after which another try may go well

    def __init__(self, name: str, url: str, tls: Optional[ssl.SSLContext], log: Log,
                 fields: Optional[Texts] = None):
        """`fields` are more header fields; with `tls` the URL is one of https."""
        super().__init__(name)
        parts = urllib.parse.urlsplit(url)
        self.host = parts.hostname
        self.port = parts.port or DEFAULT_PORTS[parts.scheme]
        self.target = (parts.path or "/") + ("?" + parts.query if parts.query else "")
        self.connect = partial(http.client.HTTPSConnection, context=tls) if tls else (
            http.client.HTTPConnection)
        self.log = log
        self.fields = {"Content-Type": "application/json", "User-Agent": "llm_proxy/" + VERSION,
                       **(fields or {})}
        self.thread.start()

    def write_queued(self):
        while self.queue:
            batch = self.take(self.MOST)
            try:
                taken = self.deliver(self.bundle(batch))
            except Exception:
                self.log.report()
                taken = False
            self.dropped += 0 if taken else len(batch)

    def bundle(self, items):
        """Returns one body of them."""
        return items[0]

    def deliver(self, payload):
        data = to_json_bytes(payload)
        for delay in self.DELAYS:
            if delay and self.stop.wait(delay):  # when the process ends there is one try
                break
            fault = self.post(data)
            if fault is None:
                return True
            if fault.startswith("status") and fault.split()[1] not in self.PASSING:
                break
        name = self.thread.name
        self.log.say(f"{name} cannot be delivered: {fault}", name)
        return False

    def post(self, data):
        """Posts one body; returns why it was not taken, None if it was."""
        connection = self.connect(self.host, self.port, timeout=self.SECONDS)
        try:
            connection.request("POST", self.target, data, self.fields)
            status = connection.getresponse().status
            return None if status < 300 else f"status {status}"
        except (OSError, ValueError, http.client.HTTPException) as failure:
            return CAUSES.get(type(failure), "connection failed")
        finally:
            connection.close()


# -- metrics, as Prometheus reads them (https://prometheus.io/docs/instrumenting/exposition_formats)

OTHER = "other"  # label of names beyond those that have their own
NONE = "-"       # label for no name
CALL_LABELS = "caller model upstream dialect outcome".split()
TOKEN_KINDS = "input cached cache_write output reasoning".split()
WAITS = "0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 1 2.5 5 7.5 10 20 40 80 160 640"
# Of each its kind, and what it is.
METRICS = table_of("""
    llm_proxy_requests_total counter Calls that have ended
    llm_proxy_tokens_total counter Tokens used; cached, cache_write, reasoning are parts of others
    llm_proxy_usd_total counter What calls cost, where their price is known
    llm_proxy_unpriced_total counter Calls whose price is not known
    llm_proxy_estimated_total counter Calls whose tokens are guessed, because nobody told them
    llm_proxy_refused_total counter Calls that a rule refused
    llm_proxy_redacted_total counter What was found in calls that must not leave, by kind
    llm_proxy_loop_held_seconds_total counter How long something held the event loop too long
    llm_proxy_dropped_total counter What could not be written or delivered
    llm_proxy_request_duration_seconds histogram From a call's head to its end
    llm_proxy_first_byte_seconds histogram From a call's head to the first byte of its answer
    llm_proxy_time_per_output_token_seconds histogram Of streams, between two tokens
    llm_proxy_queue_wait_seconds histogram In line before a busy upstream
    llm_proxy_overhead_seconds histogram In the proxy's own hands, until sent and from the answer on
    llm_proxy_in_flight gauge Calls that an upstream runs
    llm_proxy_queue_length gauge Calls that wait in line before an upstream
    llm_proxy_upstream_state gauge Addresses of an upstream in this state; closed is well
    llm_proxy_bucket_level gauge What is left in buckets that are not full, USD where these count it
    llm_proxy_bucket_capacity gauge What these hold at most
    llm_proxy_limits_degraded gauge Whether Redis is away, so that limits are not shared
    llm_proxy_build_info gauge What runs here
    process_cpu_seconds_total counter CPU time
    process_max_fds gauge Descriptors it may open
    process_open_fds gauge Descriptors
    process_resident_memory_bytes gauge Memory""")
HISTOGRAMS = {  # of each upstream: where their buckets end, in seconds
    "llm_proxy_request_duration_seconds":
        "0.01 0.02 0.04 0.08 0.16 0.32 0.64 1.28 2.56 5.12 10.24 20.48 40.96 81.92 163.84 327.68"
        " 655.36 1310.72",
    "llm_proxy_first_byte_seconds": WAITS,
    "llm_proxy_time_per_output_token_seconds":
        "0.0025 0.005 0.01 0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.4 0.5 0.75 1 2.5",
    "llm_proxy_queue_wait_seconds": WAITS,
    "llm_proxy_overhead_seconds":
        "0.0001 0.00025 0.0005 0.001 0.0025 0.005 0.01 0.025 0.05 0.1 0.25 0.5 1 2.5"}
Samples = Iterable[Tuple[str, Union[int, float, str]]]  # (what follows the name, value)
Families = Dict[str, Samples]  # name in METRICS -> samples


def metric_lines(name: str, samples: Samples) -> Iterator[str]:
    kind, _, meaning = METRICS[name].partition(" ")
    yield f"# HELP {name} {meaning}"
    yield f"# TYPE {name} {kind}"
    for end, value in samples:
        yield f"{name}{end} {value}"


def labels_of(**values: str) -> str:
    """Returns labels as they are written; what nobody sees is spelled out."""
    shown = [(name, visible(clean(value)).replace("\\", r"\\").replace("\n", r"\n"))
             for name, value in values.items()]
    return "{%s}" % ",".join('%s="%s"' % (name, value.replace('"', r'\"'))
                             for name, value in shown)


def with_label(labels, name, value):
    return f'{labels[:-1]},{name}="{value}"}}'


class Histogram:
    """Counts how many durations fell below each of some bounds. They are sorted in many at once,
    because that costs each next to nothing."""
    count = 0
    total = 0.0

    def __init__(self, bounds: str):
        self.texts = bounds.split()
        self.bounds = list(map(float, self.texts))
        # Those that are yet to be sorted in; as objects they would crowd the processor's cache.
        self.times = array.array("d")
        self.counts = [0] * len(self.bounds)

    def sort_in(self):
        times = sorted(self.times)
        del self.times[:]
        self.count += len(times)
        self.total += math.fsum(times)
        for number, bound in enumerate(self.bounds):
            self.counts[number] += bisect.bisect_right(times, bound)

    def samples(self, labels: str) -> Samples:
        self.sort_in()
        for bound, count in zip([*self.texts, "+Inf"], [*self.counts, self.count]):
            yield "_bucket" + with_label(labels, "le", bound), count
        yield "_sum" + labels, f"{self.total:.9f}"
        yield "_count" + labels, self.count


class Times:
    """The histograms of one upstream, in the order of HISTOGRAMS."""
    def __init__(self):
        self.histograms = list(map(Histogram, HISTOGRAMS.values()))
        self.duration, self.first_byte, self.token, self.queue, self.overhead = [
            one.times for one in self.histograms]


class Series:
    """The calls that have these labels, and what they used."""
    calls = picodollars = unpriced = estimated = 0
    input = cached = cache_write = output = reasoning = 0  # TOKEN_KINDS

    def __init__(self, values: Sequence[str], times: Times):
        self.labels = labels_of(**dict(zip(CALL_LABELS, values)))
        self.times = times

    def add_usage(self, usage):
        prompt, output, cached, cache_write, reasoning, estimated = usage[:6]
        self.input += prompt
        self.output += output
        self.cached += cached
        self.cache_write += cache_write
        self.reasoning += reasoning
        self.estimated += estimated


def samples_by(label, counts):
    return [(labels_of(**{label: name}), count) for name, count in counts.items()]


class Metrics(Watcher):
    """Counts calls as the ledger does. Callers may invent names, so there are only so many series:
    a model has its own once an upstream has answered for it."""
    MAX_NAMES = 200     # of callers, of models, and of rules that refused
    MAX_SERIES = 5_000
    MAX_KNOWN = 10_000  # spellings of calls whose series is known
    held = 0.0          # seconds in which something held the loop
    counts_all = True

    def __init__(self):
        self.known = {}    # what calls say of themselves -> Series
        self.series = {}   # labels -> Series
        self.times = {}    # Times by upstream
        self.callers = {}  # labels by key
        self.models = set()
        self.refused = Counter()   # rule -> refusals
        self.redacted = Counter()  # kind -> redacted values

    def record(self, entry):
        call = entry.call
        usage = entry.usage
        key = (entry.caller.label, call.upstream_model, entry.upstream, call.dialect,
               entry.outcome) if call else (entry.caller, entry.outcome)
        series = self.known.get(key) or self.find(key, entry)
        series.calls += 1
        times = series.times
        started = entry.started
        times.duration.append(entry.ended - started)
        if usage:
            series.add_usage(usage)
            series.picodollars += entry.picodollars
            series.unpriced += not entry.priced
        first_byte = entry.first_byte
        if first_byte is not None:
            waited = first_byte - started
            times.first_byte.append(waited)
            if usage:
                times.overhead.append(waited - entry.held_up)
                if call.stream and usage.output > 1:
                    times.token.append((entry.ended - first_byte) / (usage.output - 1))
        if entry.queued is not None:
            times.queue.append(entry.queued / 1000)

    def sort_in(self):
        """Counts the durations that wait: a microsecond for each."""
        for times in self.times.values():
            for one in times.histograms:
                if one.times:
                    one.sort_in()

    def find(self, key, entry):
        """Returns the series of such calls, which is looked up by `key` from then on. What a rule
        refused is counted here, too."""
        upstream = entry.upstream or NONE
        rest = upstream, entry.call.dialect.name if entry.call else NONE, entry.outcome
        values = (self.caller_label(entry.caller), self.model_label(entry), *rest)
        if values not in self.series and len(self.series) >= self.MAX_SERIES:
            values = OTHER, OTHER, *rest
        if values not in self.series:
            times = self.times.setdefault(upstream, Times())
            self.series[values] = Series(values, times)
        if len(self.known) >= self.MAX_KNOWN:
            self.known.clear()
        if entry.outcome == LimitReached.outcome:  # limited calls come here each time
            has_name = entry.cause in self.refused or len(self.refused) < self.MAX_NAMES
            self.refused[entry.cause if has_name else OTHER] += 1
        else:
            self.known[key] = self.series[values]
        return self.series[values]

    def caller_label(self, caller):
        if caller is None:
            return NONE
        if caller.key not in self.callers and len(self.callers) < self.MAX_NAMES:
            self.callers[caller.key] = visible(clean(caller.label))
        return self.callers.get(caller.key, OTHER)

    def model_label(self, entry):
        model = visible(clean(entry.call.upstream_model or "")[:80]) if entry.call else ""
        answered = entry.outcome == "ok" and entry.status == 200
        if model and model not in self.models and answered and len(self.models) < self.MAX_NAMES:
            self.models.add(model)
            self.known.clear()  # from now on its calls have a series of their own
        return model if model in self.models else OTHER if model else NONE

    # -- what is told when somebody asks

    def totals(self) -> Tuple[int, int, int, int]:
        """Returns how many calls ended, how many of them failed, and their tokens and
        picodollars."""
        counts = [(one.calls, 0 if names[-1] in PASSED else one.calls, one.input + one.output,
                   one.picodollars) for names, one in self.series.items()]
        return tuple(map(sum, zip((0, 0, 0, 0), *counts)))

    def families(self) -> Families:
        """Returns what was counted."""
        families = {
            "llm_proxy_requests_total": self.samples("calls"),
            "llm_proxy_tokens_total": (
                (with_label(labels, "kind", kind), count)
                for kind in TOKEN_KINDS for labels, count in self.samples(kind)),
            "llm_proxy_usd_total": ((labels, amount / PICODOLLARS)
                                    for labels, amount in self.samples("picodollars")),
            "llm_proxy_unpriced_total": self.samples("unpriced"),
            "llm_proxy_estimated_total": self.samples("estimated"),
            "llm_proxy_refused_total": samples_by("rule", self.refused),
            "llm_proxy_redacted_total": samples_by("kind", self.redacted),
            "llm_proxy_loop_held_seconds_total": [("", f"{self.held:.6f}")]}
        for number, name in enumerate(HISTOGRAMS):
            families[name] = [sample for upstream, times in self.times.items() for sample
                              in times.histograms[number].samples(labels_of(upstream=upstream))]
        return families

    def samples(self, count):
        """Returns a sample of each series that has counted any."""
        return [(one.labels, getattr(one, count)) for one in self.series.values()
                if getattr(one, count)]

    def bucket_families(self, buckets: Buckets) -> Families:
        """Returns the buckets of callers that are known here, and of nobody, that are not full. Of
        several keys with one name the last one's counts."""
        labelled = {}
        for seen in buckets.seen():
            owners = [self.callers.get(owner) for owner in seen.key[1:]]
            if None not in owners and len(labelled) < self.MAX_SERIES:
                labels = labels_of(rule=seen.rule.text, caller=" ".join(owners) or NONE)
                labelled[labels] = seen.rule, seen.key
        return {
            "llm_proxy_bucket_level": (
                (labels, format_amount(rule, buckets.level_of(rule, key).level))
                for labels, (rule, key) in labelled.items()),
            "llm_proxy_bucket_capacity": (
                (labels, format_amount(rule, buckets.capacity_of(rule, key)))
                for labels, (rule, key) in labelled.items())}


class Pulse(Watcher):
    """Collects what happens, second by second: numbers of the last MINUTE seconds, times to the
    first byte, which buckets changed, and who called lately."""
    MINUTE = 60
    PER_SECOND = 100  # times: percentiles of all would be no truer
    MAX_CALLERS = 1_000
    MAX_SHOWN = 100
    counts_all = True  # a refused caller has called lately, too

    def __init__(self, clock: Any, buckets: Buckets, feed: Feed, metrics: Metrics):
        self.clock = clock
        self.buckets = buckets
        self.feed = feed
        self.metrics = metrics
        self.before = metrics.totals()
        self.seconds = deque(maxlen=self.MINUTE)
        self.times = deque(  # (end, seconds, upstream)
            maxlen=self.MINUTE * self.PER_SECOND)
        self.room = self.PER_SECOND  # events that this second has room for
        self.callers = {}  # key -> (caller, time of its last call in ns)
        self.changed = {}  # key of a bucket -> (rule, caller)

    def record(self, entry):
        caller = entry.caller
        if caller is None:
            return
        self.callers[caller.key] = caller, entry.wall
        if entry.redactions:
            self.metrics.redacted.update(entry.redactions)
        if self.room and entry.first_byte is not None:
            self.room -= 1
            self.times.append((entry.ended, entry.first_byte - entry.started, entry.upstream))
        if self.feed.listeners and entry.hold and len(self.changed) < self.MAX_SHOWN:
            for rule, key in entry.hold.keyed_rules:
                self.changed[key] = rule, caller

    def named(self, label: str) -> List[Caller]:
        """Returns who called lately by this label."""
        return [caller for caller, _ in self.callers.values() if caller.label == label]

    def first_bytes(self, upstream: Optional[str] = None) -> Dict[str, Optional[int]]:
        """Returns percentiles of the last minute, in milliseconds."""
        oldest = self.clock.monotonic() - self.MINUTE
        times = sorted(seconds for ended, seconds, name in self.times
                       if ended >= oldest and upstream in (None, name))
        return {f"first_p{share}":
                int(times[len(times) * share // 100] * 1000) if times else None
                for share in (50, 95)}

    def tick(self, running: int, line: int) -> JsonObject:
        """Returns what was in the second that is over."""
        totals = self.metrics.totals()
        calls, failed, tokens, picodollars = map(int.__sub__, totals, self.before)
        self.before = totals
        second = {"now": wall_time(self.clock), "calls": calls, "tokens": tokens,
                  "failed": failed, "in_flight": running, "line": line,
                  "usd": format_usd(picodollars), **self.first_bytes()}
        self.seconds.append(second)
        self.room = self.PER_SECOND
        if len(self.callers) > self.MAX_CALLERS:
            lately = sorted(self.callers.items(), key=lambda one: one[1][1])
            self.callers = dict(lately[-self.MAX_CALLERS // 2:])
        return second

    def bucket(self, rule: Rule, key: BucketKey) -> JsonObject:
        """Returns a bucket as the page shows it."""
        level = self.buckets.level_of(rule, key)
        rule = level.rule  # which knows how long this month is
        now, wall = self.clock.monotonic(), wall_time(self.clock)
        capacity = self.buckets.capacity_of(rule, key)
        refill = min(rule.refill, capacity - min(0, level.level))
        missing = -(-(capacity - level.level) // refill)
        runs = rule.unit == RUNNING
        return {"rule": rule.text, "unit": rule.word,
                "level": format_amount(rule, level.level),
                "capacity": format_amount(rule, capacity),
                "refill": 0 if runs else format_amount(rule, refill),
                "interval": 0 if runs else rule.interval,
                "refilled": wall - (now - level.refilled),
                "full_in": 0 if runs else max(
                    0, round(level.refilled + missing * rule.interval - now, 3))}

    def changed_buckets(self) -> List[JsonObject]:
        """Returns those of the last second."""
        changed = self.changed
        self.changed = {}
        return [{"caller": caller.label, **self.bucket(rule, key)}
                for key, (rule, caller) in changed.items()]


def upstream_states(routes: Routes) -> Samples:
    """Yields how many addresses of each upstream are in each state; no address is named."""
    for upstream in routes.all:
        states = ["disabled"] * len(upstream.addresses) if upstream.disabled else upstream.states()
        for state in (*STATES, "disabled"):
            yield labels_of(upstream=upstream.name, state=state), states.count(state)


def load_families(routes: Routes) -> Families:
    """Returns how busy the upstreams are."""
    stats = [(labels_of(upstream=one.name), one.stats()) for one in routes.all]
    return {
        "llm_proxy_in_flight": [(labels, counts["in_flight"]) for labels, counts in stats],
        "llm_proxy_queue_length": [(labels, counts.get("queue", {"waiting": 0})["waiting"])
                                   for labels, counts in stats]}


def process_families() -> Families:
    """Returns what the system says of this process, under the names that all programs have."""
    cpu = os.times()
    values = {"process_cpu_seconds_total": f"{cpu.user + cpu.system:.2f}"}
    with suppress(OSError, ImportError, ValueError):  # Linux alone has all of them
        import resource
        values["process_max_fds"], _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        values["process_open_fds"] = len(os.listdir("/proc/self/fd"))
        with open("/proc/self/statm", "rb") as file:
            pages = int(file.read().split()[1])
        values["process_resident_memory_bytes"] = pages * resource.getpagesize()
    return {name: [("", value)] for name, value in values.items()}


# -- traces, as OpenTelemetry has them

TRACEPARENT = re.compile(  # https://www.w3.org/TR/trace-context; 00 has nothing after its flags
    "(?!ff|00.{53}.)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})"
    "(?:-.*)?")
SEMANTIC_CONVENTIONS = "1.41.0"
SPAN_OF_CLIENT, SPAN_FAILED = 3, 2  # a span's kind and status
# The names of those conventions, and ours, each with what of a call it tells.
ATTRIBUTES = table_of("""
    http.request.method method
    http.route route
    http.response.status_code status
    gen_ai.operation.name operation
    gen_ai.provider.name provider
    gen_ai.request.model model
    gen_ai.response.model served
    gen_ai.response.finish_reasons reasons
    gen_ai.usage.input_tokens input
    gen_ai.usage.output_tokens output
    gen_ai.usage.cache_read.input_tokens cached
    gen_ai.usage.reasoning.output_tokens reasoning
    error.type error
    llm_proxy.request_id id
    llm_proxy.caller caller
    llm_proxy.upstream upstream
    llm_proxy.outcome outcome
    llm_proxy.rule rule
    llm_proxy.queue_ms queue_ms
    llm_proxy.first_ms first_ms
    llm_proxy.usd usd
    llm_proxy.estimated estimated""")
USAGE_FACTS = "input output cached reasoning served estimated".split()
# By endpoint; others have the last word of their path.
OPERATIONS = table_of("""
    chat chat
    responses chat
    messages chat
    interactions chat
    completions text_completion
    fim text_completion
    generate generate_content
    embed embeddings""")
# By upstream or dialect, where the conventions have another name.
PROVIDERS = table_of("""
    gemini gcp.gemini
    interactions gcp.gemini
    azure azure.ai.openai
    grok x_ai
    mistral mistral_ai""")


class Trace:
    """Of what a call is a part, and by which number; all in hexadecimal."""
    __slots__ = ("number", "parent", "flags", "span")

    def __init__(self, number: Optional[str] = None, parent: str = "", flags: str = "01"):
        self.number = number or f"{random.getrandbits(128):032x}"
        self.parent = parent
        self.flags = flags
        self.span = f"{random.getrandbits(64):016x}"

    @classmethod
    def join(cls, fields: Fields) -> "Trace":
        """Returns the caller's trace, or a new one."""
        match = TRACEPARENT.fullmatch(fields.get("traceparent", ""))
        return cls(*match.groups()) if match else cls()

    @staticmethod
    def replaced(fields: Fields) -> List[str]:
        """Returns the fields that do not go upstream as they came."""
        match = TRACEPARENT.fullmatch(fields.get("traceparent", ""))
        return ["traceparent"] if match else ["traceparent", "tracestate"]

    def line(self) -> bytes:
        """Returns a header line that names this call as the parent."""
        return f"traceparent: 00-{self.number}-{self.span}-{self.flags}\r\n".encode()


class Traces(Poster, Watcher):
    """Posts one span of each call (https://opentelemetry.io/docs/specs/otlp, OTLP/HTTP in JSON: ids
    in hexadecimal, whole numbers as text)."""
    MOST = 500

    def __init__(self, service: str, *poster: Any, **options: Any):
        self.resource = {"attributes": self.attributes(
            {"service.name": service, "service.version": VERSION})}
        super().__init__(*poster, **options)

    # -- in a thread

    def bundle(self, entries):
        return {"resourceSpans": [{"resource": self.resource, "scopeSpans": [{
            "scope": {"name": "llm_proxy", "version": VERSION},
            "schemaUrl": "https://opentelemetry.io/schemas/" + SEMANTIC_CONVENTIONS,
            "spans": list(map(self.span, entries))}]}]}

    def span(self, entry):
        facts = self.facts(entry)
        trace = entry.trace or Trace()
        named = {name: facts[fact] for name, fact in ATTRIBUTES.items()
                 if facts[fact] not in (None, "", [])}
        took = int((entry.ended - entry.started) * 1e9)
        span = {
            "traceId": trace.number, "spanId": trace.span, "flags": int(trace.flags, 16),
            "name": " ".join(filter(None, (
                facts["operation"] or facts["method"], facts["model"]))),
            "kind": SPAN_OF_CLIENT, "startTimeUnixNano": str(entry.wall - took),
            "endTimeUnixNano": str(entry.wall), "attributes": self.attributes(named)}
        if trace.parent:
            span["parentSpanId"] = trace.parent
        if facts["error"]:
            span["status"] = {"code": SPAN_FAILED}
        return span

    def facts(self, entry):
        """Returns the row of a call, and what spans tell besides."""
        facts = {**entry.as_fields(), **self.kind(entry), "reasons": list(entry.reasons)}
        if entry.usage is None:
            facts.update(dict.fromkeys(USAGE_FACTS))
        if not entry.priced:
            facts["usd"] = None
        status = entry.outcome == "upstream_status"
        facts["error"] = None if entry.outcome == "ok" else (
            str(entry.status) if status else entry.outcome)
        facts["rule"] = entry.cause if entry.outcome == LimitReached.outcome else None
        return facts

    @staticmethod
    def kind(entry):
        call = entry.call
        route, operation, provider = entry.path[:200], None, entry.upstream
        if call and call.stored and call.stored.name:
            route = route.replace("/" + call.stored.name, "/{id}")
        if call and call.endpoint is not None:
            last_word = call.path.rpartition("/")[2][:80]
            operation = OPERATIONS.get(call.endpoint, last_word)
        if call and provider not in VENDORS:
            provider = call.dialect.name
        return {"route": route, "operation": operation,
                "provider": PROVIDERS.get(provider, provider)}

    @classmethod
    def attributes(cls, values):
        return [{"key": name, "value": cls.typed(value)} for name, value in values.items()]

    @classmethod
    def typed(cls, value):
        if type(value) is list:
            return {"arrayValue": {"values": list(map(cls.typed, value))}}
        kinds = {str: "stringValue", float: "doubleValue", int: "intValue", bool: "boolValue"}
        return {kinds[type(value)]: str(value) if type(value) is int else value}


# -- warnings

def shares_used(hold: Hold) -> List[Tuple[float, Level]]:
    """Returns what share is used of each bucket of a call that counts tokens or money."""
    used = []
    for rule, key in hold.keyed_rules:
        if UNITS[rule.unit] not in UNITS_OF_CALLS:
            level = hold.buckets.level_of(rule, key)
            used.append(((rule.capacity - level.level) / rule.capacity, level))
    return used


def warning_text(shares: List[Tuple[float, str]], marks: Sequence[float]) -> Optional[str]:
    """Returns what tells a caller that a limit is near: of (share that is used, rule) the largest,
    where that is past a mark."""
    share, rule = max(shares, default=(0, ""))
    if share < min(marks, default=inf):
        return None
    return f"{int(100 * share)}% of {ascii(rule)} is used"


class Warnings(Watcher):
    """Tells the operator what should be known: on the page, by one line in the log, and to a
    webhook; the same of the same at most once in QUIET_SECONDS."""
    QUIET_SECONDS = 3600
    KEY_SECONDS = 86400  # before its end, of a key that lives longer
    ROOM = 10_000
    dropped = 0          # calls that the ledger is said to have lost

    def __init__(self, clock: Any, log: Log, feed: Feed, webhook: Optional[Poster]):
        self.clock = clock
        self.log = log
        self.feed = feed
        self.webhook = webhook
        # Calls what tells of a subject that several processes see, in one of them.
        self.once = lambda subject, tell: tell()
        self.quiet_until = {}  # by what was told of what, oldest first
        self.down = set()      # the upstreams that are said to be
        self.ending = set()    # keys that are said to expire, and when

    def tell(self, event: str, subject: Tuple[str, ...], line: Optional[str],
             **about: Any) -> bool:
        """Warns of something; returns whether it was told. Without a `line` the log knows it
        already."""
        now = self.clock.monotonic()
        key = (event, *subject)
        if now < self.quiet_until.get(key, -inf):
            return False
        self.quiet_until.pop(key, None)
        put_newest(self.quiet_until, key, now + self.QUIET_SECONDS, self.ROOM)
        payload = {"event": event, **about, "time": wall_time(self.clock)}
        self.feed.tell("warning", payload)
        if line:
            self.log.say(line)
        if self.webhook:
            self.webhook.record(payload)
        return True

    def look(self, routes: Routes, ledger: Optional[Ledger], keys: Iterable[Key]):
        """Looks for warnings that no call causes; to be called every few seconds."""
        for upstream in routes.all:
            name = upstream.name
            is_down = all(one.breakers.fails_for_all() for one in upstream.addresses)
            event = "upstream_down" if is_down else "upstream_up"
            if is_down != (name in self.down) and self.tell(event, (name,), None, upstream=name):
                self.down ^= {name}
        lost = ledger.dropped - self.dropped if ledger else 0
        if lost and self.tell("ledger_dropped", (), f"the ledger lost {lost} calls", rows=lost):
            self.dropped = ledger.dropped
        self.look_at_keys(keys)

    def look_at_keys(self, keys):
        now, day = wall_time(self.clock), self.KEY_SECONDS
        ending = {(key.name, key.expires) for key in keys if key.expires and not key.disabled
                  and now < key.expires < now + day and key.expires - key.created > day}
        for name, expires in ending - self.ending:
            line = "the key %s expires in %s" % (name, format_wait(expires - now))
            self.tell("key_expires", (name,), line, key=name, expires=expires)
        self.ending = ending

    def close(self, wait):
        if self.webhook:
            self.webhook.close(wait)


class Marks(Watcher):
    """Warns when a call takes a bucket past one of the shares in WARN_AT."""
    ROOM = 10_000

    def __init__(self, shares: Sequence[float], warnings: Warnings):
        self.shares = sorted(shares)
        self.warnings = warnings
        self.passed = {}  # how many of them, by those that are past one

    def record(self, entry):
        for share, level in shares_used(entry.hold) if entry.hold else ():
            key, rule = level.key, level.rule
            passed = bisect.bisect_right(self.shares, share)
            # It may have been refilled since the last call.
            alone = share - entry.hold.costs[rule.unit] / rule.capacity
            before = min(self.passed.pop(key, 0), bisect.bisect_right(self.shares, alone))
            if passed:
                put_newest(self.passed, key, passed, self.ROOM)
            if passed > before:
                self.warn(entry, share, level, passed)

    def warn(self, entry, share, level, passed):
        rule, caller = level.rule, entry.caller.label
        line = f"{caller} has used {int(100 * share)}% of {rule.text}"
        subject = level.key, passed
        self.warnings.once(subject, partial(
            self.warnings.tell, "limit_near", subject, line, caller=caller, rule=rule.text,
            level=format_amount(rule, level.level), capacity=format_amount(rule, rule.capacity),
            share=round(share, 4)))


class Watchers(NamedTuple):
    """All listeners; some exist only where they are configured."""
    feed: Feed
    pulse: Pulse
    metrics: Metrics
    warnings: Warnings
    traces: Optional[Traces] = None
    marks: Optional[Marks] = None

    def families(self, routes: Routes, books: Books, buckets: Buckets) -> Families:
        """Returns the metrics that can be added up over workers."""
        writers = {
            "log": books.log, "ledger": books.ledger, "usage_log": books.usage_log,
            "traces": self.traces, "webhook": self.warnings.webhook,
            "redis": buckets.redis}
        dropped = {name: one.dropped for name, one in writers.items() if one}
        return {**self.metrics.families(), **load_families(routes), **process_families(),
                "llm_proxy_dropped_total": samples_by("what", dropped)}

    def own_families(self, routes: Routes, buckets: Buckets) -> Families:
        """Returns the metrics that cannot be added up over workers."""
        build = labels_of(version=VERSION, python="%s %d.%d.%d" % (
            sys.implementation.name, *sys.version_info[:3]))
        families = {**self.metrics.bucket_families(buckets),
                    "llm_proxy_upstream_state": upstream_states(routes),
                    "llm_proxy_build_info": [(build, 1)]}
        if buckets.is_degraded is not None:
            families["llm_proxy_limits_degraded"] = [("", int(buckets.is_degraded))]
        return families


class Tally:
    """What the workers of one parent have counted, in memory that they share: each writes its part
    every second, and whoever is asked adds them up. The memory outlives a worker, and its successor
    goes on from there, so that no count goes back."""
    HALF = 4 << 20                # bytes, compressed; the system gives only those that are written
    HEAD = struct.Struct("<QQ")   # the number of the writing, and how long it is
    UNEVEN = 4                    # connections that one may have more than another
    YIELD_SECONDS = 0.005
    number = 0                    # the number of this worker
    before: Families = {}         # what earlier processes of this number have counted

    def __init__(self, workers: int):
        self.workers = workers
        self.memory = mmap.mmap(-1, workers * 2 * self.HALF)
        self.open = memoryview(mmap.mmap(-1, 4 * workers)).cast("I")  # connections of each

    def begin(self, number: int):
        """Makes this process the worker of this number."""
        self.number = number
        self.before = {name: samples for name, samples in self.read(number).items()
                       if not METRICS[name].startswith("gauge")}

    def let_others_first(self, connections: int):
        """Waits a moment where this worker has more connections than another one, which can accept
        the next meanwhile: all are told of it, and the same one is often the quickest."""
        self.open[self.number] = connections
        if connections > min(self.open) + self.UNEVEN:
            time.sleep(self.YIELD_SECONDS)

    def halves(self, number):
        """Returns (number of the write, length, offset) of both halves, the later one first."""
        starts = [(2 * number + half) * self.HALF for half in range(2)]
        return sorted([(*self.HEAD.unpack_from(self.memory, at), at + self.HEAD.size)
                       for at in starts], reverse=True)

    def read(self, number: int) -> Families:
        """Returns what a worker has written; where it was killed meanwhile, as it did before."""
        for _, length, at in self.halves(number):
            with suppress(zlib.error, ValueError):
                return marshal.loads(zlib.decompress(self.memory[at:at + length]))
        return {}

    def write(self, families: Families):
        data = zlib.compress(marshal.dumps(added_up([self.before, families])), 1)
        (last, *_), (_, _, at) = self.halves(self.number)
        if len(data) <= self.HALF - self.HEAD.size:
            self.memory[at:at + len(data)] = data
            self.HEAD.pack_into(self.memory, at - self.HEAD.size, last + 1, len(data))

    async def families(self) -> Families:
        """Returns the metrics of all workers together, which takes long where there are many."""
        families = {}
        for number in range(self.workers):
            families = added_up([families, self.read(number)])
            await asyncio.sleep(0)
        return families


def added_up(parts: Iterable[Families]) -> Families:
    """Returns the sums of samples."""
    sums = defaultdict(dict)
    for families in parts:
        for name, samples in families.items():
            for end, value in samples:
                sums[name][end] = plus(sums[name].get(end, 0), value)
    return {name: list(samples.items()) for name, samples in sums.items()}


def plus(one, other):
    """Adds values of samples: fractions are written with nine digits at most."""
    if type(one) is type(other) is int:
        return one + other
    return round(float(one) + float(other), 9)


# --------------------------------------------------------------------------------------------------
# Shared: what several processes have in common, in Redis: buckets, keys, sums, slots. Without
# REDIS_URL nothing of it is used. It knows no HTTP.
# --------------------------------------------------------------------------------------------------

class Worker(NamedTuple):
    """One of several processes that serve on one port, and what all have from their parent. It
    stands above Workers because `build`, which those do not know, makes its parts by it."""
    listener: socket.socket
    lock: Optional[BinaryIO]  # of the database, where there is one
    secret: bytes             # blinds digests of keys: all workers have the same labels
    tally: Tally
    number: int = 0
    lifeline: int = -1        # a descriptor that ends with the parent
    again: bool = False       # whether one of this number has died


# What errors of Redis, and of LUA_BATCH, mean, by their first word, for people.
REDIS_ERRORS = table_of("""
OOM is out of memory
READONLY is read-only
LOADING is loading its data
MASTERDOWN has lost its master
CLUSTERDOWN is a cluster that is down
MOVED is a cluster whose keys have moved
TRYAGAIN is a cluster whose keys move
ASK is a cluster whose keys move
NOAUTH asks for a password
WRONGPASS does not take the user and password
NOPERM does not permit what it is asked for
NOREPLICAS has too few replicas
MISCONF cannot write to its disk
BUSY is busy with a script
GAP has lost what it knew""")


class RedisFault(Exception):
    """Redis did not do what it was asked to. Its words, such as 'is out of memory', name no address
    and no password; `code` is the first word of what Redis said itself."""

    def __init__(self, words: str, code: str = "", moved_to: Optional[Tuple[str, int]] = None):
        super().__init__(words)
        self.code = code
        self.moved_to = moved_to

    @classmethod
    def read(cls, line: bytes) -> "RedisFault":
        code, _, rest = line.decode("latin-1").partition(" ")
        match = re.fullmatch(r"[0-9]+ ([A-Za-z0-9._:-]+):([0-9]{1,5})", rest)
        place = (match[1], int(match[2])) if code == "MOVED" and match else None
        return cls(REDIS_ERRORS.get(code, "refuses a command"), code, place)


RedisReply = Union[bytes, int, None, List["RedisReply"], RedisFault]


class RedisReader:
    """Reads replies of RESP2 as they come, in pieces of any size; it is strict, and bounded
    (https://redis.io/docs/latest/develop/reference/protocol-spec)."""
    MOST_BYTES = 16 << 20  # of one reply
    MOST_DEPTH = 5         # of arrays in arrays
    LINE_BYTES = 8192
    COUNT = re.compile(rb"0|[1-9][0-9]{0,8}|-1")
    NUMBERS = {b"$": COUNT, b"*": COUNT, b":": re.compile(rb"[+-]?[0-9]{1,19}")}
    INCOMPLETE = object()  # is yielded where more has to come first

    def __init__(self):
        self.data = bytearray()
        self.place = 0  # where the next reply begins
        self.size = 0   # of the reply so far
        self.replies = self.read_all()

    def feed(self, data: bytes) -> List[RedisReply]:
        """Returns the replies that are whole now. Raises RedisFault."""
        del self.data[:self.place]
        self.place = 0
        self.data += data
        return list(iter(partial(next, self.replies, self.INCOMPLETE), self.INCOMPLETE))

    def read_all(self):
        while True:
            self.size = 0
            yield (yield from self.read_one(0))

    def read_one(self, depth):
        line = yield from self.read_line()
        kind, text = line[:1], line[1:]
        if kind == b"-":
            return RedisFault.read(text)
        if kind == b"+":
            return text
        if kind not in self.NUMBERS or not self.NUMBERS[kind].fullmatch(text):
            raise RedisFault("does not speak RESP2")
        number = int(text)
        if kind == b":":
            return number
        if number < 0:
            return None
        if kind == b"$":
            return (yield from self.take(number))
        if depth == self.MOST_DEPTH:
            raise RedisFault("sends too deep a reply")
        items = []
        for _ in range(number):
            items.append((yield from self.read_one(depth + 1)))
        return items

    def read_line(self):
        while True:
            end = self.data.find(b"\r\n", self.place, self.place + self.LINE_BYTES)
            if end >= 0:
                return (yield from self.take(end - self.place))
            if len(self.data) - self.place >= self.LINE_BYTES:
                raise RedisFault("sends too long a line")
            yield self.INCOMPLETE

    def take(self, size):
        """Returns so many bytes, after which a line ends."""
        self.size += size + 2
        if self.size > self.MOST_BYTES:
            raise RedisFault("sends too long a reply")
        while len(self.data) < self.place + size + 2:
            yield self.INCOMPLETE
        start, end = self.place, self.place + size
        self.place = end + 2
        if self.data[end:self.place] != b"\r\n":
            raise RedisFault("does not speak RESP2")
        return bytes(self.data[start:end])


RedisPart = Union[bytes, str, int, float]


def redis_command(parts: Sequence[RedisPart]) -> bytes:
    """Returns a command as it is sent."""
    lines = [b"*%d" % len(parts)]
    for part in parts:
        if not isinstance(part, bytes):
            part = str(part).encode()
        lines += (b"$%d" % len(part), part)
    return b"\r\n".join([*lines, b""])


class RedisScript:
    """A Lua script, sent as its digest if the server has it, else as a whole."""
    is_loaded = False

    def __init__(self, text: str):
        self.text = text
        self.digest = hashlib.sha1(text.encode()).hexdigest()  # Redis's own choice

    def parts(self, keys: Sequence[RedisPart], arguments: Iterable[RedisPart]) -> List[RedisPart]:
        """Returns the command that runs it."""
        how = ("EVALSHA", self.digest) if self.is_loaded else ("EVAL", self.text)
        return [*how, len(keys), *keys, *arguments]


class Redis(asyncio.Protocol):
    """One connection, which a task makes again when it is lost. All commands of one pass of the
    loop go in one write; replies come in the same order. The server counts as away when it refuses
    or cuts the connection, says nothing for SILENT_SECONDS, is late LATE_TIMES in a row, or fails
    what `on_connect` asks; it is `available` again once all of that went well."""
    ANSWER_SECONDS = 0.08    # for which a call waits, in all
    SHORT_SECONDS = 0.002    # of a wait that does not count
    LATE_SECONDS = 0.05
    LATE_TIMES = 3
    SILENT_SECONDS = 0.3
    TICK_SECONDS = 0.01      # between two looks at that, which come after what has arrived is read
    CONNECT_SECONDS = 1
    STEADY_SECONDS = 1       # a connection that lasted so long was a good one
    LONGEST_PAUSE = 0.4      # between two connections
    MOST_COMMANDS = 10_000   # kept while Redis is away; as many more may have no reply

    available = False
    transport: Optional[asyncio.Transport] = None
    task: Optional[asyncio.Task] = None
    lost: Optional[asyncio.Future] = None     # completed when the connection has ended,
    reason: Optional[RedisFault] = None       # and why
    flushing = False
    has_timed_out = False                     # a call, since the last reply
    late = False                              # the reply that is waited for
    late_times = 0
    ticking = False
    dropped = 0                               # commands and charges without room

    def __init__(self, url: Endpoint, tls: Optional[ssl.SSLContext],
                 loop: Loop, name: str):
        """`name` is what the server lists this client as."""
        self.url = url
        self.tls = tls
        self.loop = loop
        self.name = name
        self.process = os.urandom(8).hex()  # the name of this process for the others
        self.scripts = []
        # Awaited on each new connection before it is available: they use `ask_and_wait`, and raise
        # RedisFault.
        self.on_connect = []
        self.on_return = []
        self.on_leave = []         # called with the reason, also after each try that failed
        self.on_flush = []         # called before commands are sent, to add some
        self.unsent = []           # (command, callback or None)
        self.asked = deque()       # (command, callback or None, when it was sent)
        self.waits = []            # (since when a call waits, for how long, its future)
        # What calls have left of ANSWER_SECONDS, by task, of those that have waited for a while.
        self.patience = WeakKeyDictionary()

    # -- for everyone, on the loop

    async def call(self, *parts: RedisPart) -> RedisReply:
        """Returns the reply to a command. Raises RedisFault, once this call has waited for
        ANSWER_SECONDS; the command may have been done, or may be yet."""
        if not self.available or self.is_late():
            raise RedisFault("answers late" if self.available else "is away")
        return await self.ask_and_wait(*parts, is_bounded=True)

    def begin_call(self):
        """Notes that another call begins in this task, with all of ANSWER_SECONDS."""
        if self.patience:
            self.patience.pop(asyncio.current_task(), None)

    def is_late(self) -> bool:
        """Returns whether this call is not to wait: it has no time left, or nothing has come since
        a call timed out."""
        return self.has_timed_out or self.left() <= 0

    def left(self) -> float:
        """Returns for how long this call may wait yet."""
        if not self.patience:
            return self.ANSWER_SECONDS
        task = asyncio.current_task(self.loop) or self  # what runs in no task is no call
        return self.patience.get(task, self.ANSWER_SECONDS)

    async def ask_and_wait(self, *parts: RedisPart, is_bounded: bool = False) -> RedisReply:
        """Returns the reply to a command, whether or not the connection is available yet; waits as
        long as that takes, unless it `is_bounded`. Raises RedisFault."""
        answered = self.loop.create_future()
        self.ask(lambda reply: answered.done() or answered.set_result(reply), *parts)
        reply = await (self.wait(answered) if is_bounded else answered)
        if isinstance(reply, RedisFault):
            raise reply
        return reply

    async def wait(self, future: asyncio.Future) -> RedisReply:
        """Returns what a future is completed with, which is a RedisFault once this call has waited
        for ANSWER_SECONDS."""
        began = self.limit_wait(future)
        reply = await future
        waited = self.loop.time() - began
        if waited > self.SHORT_SECONDS:
            self.patience[asyncio.current_task()] = self.left() - waited
        return reply

    def limit_wait(self, future: asyncio.Future) -> float:
        """Completes a future with a RedisFault if nobody else does while this call may wait;
        returns the time at which the wait began."""
        began = self.loop.time()
        self.waits.append((began, self.left(), future))
        self.tick_soon()
        return began

    def ask(self, answer: Optional[Callable[[RedisReply], None]], *parts: RedisPart):
        """Sends a command at the end of this pass of the loop; `answer` is called with the reply or
        a RedisFault. Without it the command waits until Redis is there, and is sent again, so maybe
        done twice, if the connection is lost."""
        # What is kept leaves room to greet Redis, which would stay away else.
        most = 2 * self.MOST_COMMANDS if answer else self.MOST_COMMANDS
        has_room = len(self.asked) + len(self.unsent) < most
        if has_room and (self.transport or answer is None):
            self.unsent.append((redis_command(parts), answer))
            self.flush_soon()
        elif answer:
            answer(RedisFault("is away"))
        else:
            self.dropped += 1

    def flush_soon(self):
        if not self.flushing:
            self.flushing = True
            self.loop.call_soon(self.flush)

    def leave(self, reason: RedisFault):
        """Ends the connection; another one is made."""
        self.available = False
        self.reason = self.reason or reason
        if self.transport:
            self.transport.abort()

    def leave_if_refused(self, fault: RedisFault):
        """Ends the connection after an error that Redis itself sent: it counts as away."""
        if fault.code:
            self.leave(fault)

    # -- its life

    def start(self):
        self.task = self.loop.create_task(self.live(), name="redis")

    async def close(self):
        """Waits until Redis, if it is there, has what was sent, and ends."""
        with suppress(RedisFault):
            await self.call("PING")
        if self.task:
            self.task.cancel()
            await asyncio.wait([self.task])

    async def live(self):
        place, pause, moved_to = None, 0, None
        while True:
            self.reason = None
            self.lost = self.loop.create_future()
            began = inf
            try:
                await self.begin(place)
                began = self.loop.time()
                await self.lost
            except RedisFault as fault:
                self.leave(fault)
            except Exception as bug:  # of ours: log it and connect again
                self.leave(RedisFault("is answered wrongly"))
                self.loop.call_exception_handler({"message": "Redis", "exception": bug})
            finally:
                self.leave(RedisFault("is away"))
                if self.transport:
                    await self.lost
            if moved_to and began == inf:  # not from node to node for ever: begin anew
                self.reason.moved_to = None
            moved_to = self.reason.moved_to
            for act in self.on_leave:
                act(self.reason)
            is_steady = self.loop.time() - began > self.STEADY_SECONDS
            place = moved_to or is_steady and place
            pause = 0 if is_steady else min(self.LONGEST_PAUSE, 2 * pause + 0.05)
            await asyncio.sleep(pause)

    async def begin(self, place):
        """Connects, introduces this client, and says that it is there. Raises RedisFault."""
        await self.connect(place)
        url = self.url
        if url.password:
            await self.ask_and_wait("AUTH", *filter(None, (url.user, url.password)))
        if url.host and url.path:
            await self.ask_and_wait("SELECT", url.path[1:])
        with suppress(RedisFault):  # a user without this right may have all others
            await self.ask_and_wait("CLIENT", "SETNAME", self.name)
        for script in self.scripts:
            script.is_loaded = False
            with suppress(RedisFault):
                digest = await self.ask_and_wait("SCRIPT", "LOAD", script.text)
                script.is_loaded = digest == script.digest.encode()
        for act in self.on_connect:
            await act()
        if self.reason:
            raise self.reason
        self.available = True
        self.late_times = 0
        self.flush_soon()
        for act in self.on_return:
            act()

    async def connect(self, place):
        connecting = self.loop.create_task(self.open_connection(place), name="redis connects")
        try:
            await asyncio.wait([connecting], timeout=self.CONNECT_SECONDS)
            if not connecting.done():
                raise RedisFault("does not answer")
            connecting.result()
        except ssl.SSLCertVerificationError:
            raise RedisFault("has a certificate that is not trusted") from None
        except (OSError, ValueError) as failure:
            is_tls = isinstance(failure, ssl.SSLError)
            raise RedisFault("does not speak TLS" if is_tls else "is not there") from None
        finally:
            connecting.cancel()

    async def open_connection(self, place):
        url = self.url
        if not url.host:
            return await self.loop.create_unix_connection(lambda: self, url.path)
        host, port = place or (url.host, url.port)
        await self.loop.create_connection(
            lambda: self, host, port, ssl=self.tls,
            server_hostname=url.host if self.tls else None)

    # -- what the connection says: the names are asyncio's

    def connection_made(self, transport):
        self.transport = transport
        self.reader = RedisReader()
        if self.url.host:
            keep_alive(transport.get_extra_info("socket"))

    def data_received(self, data):
        try:
            replies = self.reader.feed(data)
            if len(replies) > len(self.asked):
                raise RedisFault("answers what it was not asked")
        except RedisFault as fault:
            return self.leave(fault)
        if replies:
            self.has_timed_out = False
            self.late_times = self.late_times + 1 if self.late else 0
            self.late = False
            if self.late_times >= self.LATE_TIMES:
                self.leave(RedisFault("answers late"))
        for reply in replies:
            _, answer, _ = self.asked.popleft()
            if answer:
                answer(reply)

    def connection_lost(self, failure):
        self.leave(RedisFault("has closed the connection"))
        self.transport = None
        lost = [*self.asked, *self.unsent]
        self.asked = deque()
        self.unsent = [(data, None) for data, answer, *_ in lost if answer is None]
        for _, answer, *_ in lost:
            if answer:
                answer(RedisFault("is away"))
        Stream.wake(self.lost)

    # -- what becomes of commands

    def flush(self):
        """Sends what was asked for in one pass of the loop."""
        try:
            for ask in self.on_flush:
                ask()
        finally:
            self.flushing = False
        if self.transport is None:
            return
        unsent, self.unsent = self.unsent, []
        if not self.available:
            self.unsent = [one for one in unsent if one[1] is None]
            unsent = [one for one in unsent if one[1]]
        if unsent:
            now = self.loop.time()
            self.asked.extend([(*one, now) for one in unsent])
            self.tick_soon()
            self.transport.write(b"".join([data for data, _ in unsent]))

    def tick_soon(self):
        if not self.ticking:
            self.ticking = True
            self.loop.call_later(self.TICK_SECONDS, self.tick)

    def tick(self):
        """Ends waits that took too long, and a connection that says nothing."""
        now, self.ticking = self.loop.time(), False
        self.give_up(now)
        if self.asked:
            waited = now - self.asked[0][-1]
            self.late = waited > self.LATE_SECONDS
            if waited > self.SILENT_SECONDS:
                self.leave(RedisFault("does not answer"))
        if self.asked or self.waits:
            self.tick_soon()

    def give_up(self, now=inf):
        """Ends the waits that have lasted as long as their calls may wait."""
        for began, left, future in self.waits:
            if not future.done() and began + left <= now:
                self.has_timed_out |= began + self.ANSWER_SECONDS <= now
                future.set_result(RedisFault("answers late"))
        self.waits = [one for one in self.waits if not one[-1].done()]


START_OF_2020 = 1577836800

# The time in microseconds since then, which a double holds to a fraction.
LUA_TIME = """
local time = redis.call('TIME')
local now = (time[1] - 1577836800) * 1000000 + time[2]
"""

# Takes, charges and settles for a batch of calls. KEYS[1] has the number of the last batch of this
# process: any other than the one before this is a GAP, for Redis has lost something, or the
# process has begun anew meanwhile. ARGV are the process, and the number, the kind and figures of
# each bucket, then what to do: acts with their arguments. Amounts are whole, below 2^53.
#
# A bucket's text is 'level stamp birth (amount until)... |process=amount...': the gifts beyond the
# rule, and what each process has taken since the bucket was full, at `birth`; of running calls it
# is '(process count until)...'. No key is a full bucket. As a text tells what is whose, a process
# that does not know what became of its last batches sets its part back to what it saw, and sends
# them again. What Redis has lost each puts back as it saw it last: of several texts together the
# level is what has come in, which is its level and all that was taken, less what each has taken.
LUA_BATCH = LUA_TIME + """
local me, words = ARGV[1], string.gmatch(ARGV[2], '%S+')
local function number() return tonumber(words()) end
local function text(value) return string.format('%.0f', value) end
local sequence = number()
local unpack = unpack or table.unpack
local found = redis.call('MGET', unpack(KEYS))
if tonumber(found[1] or 0) ~= sequence - 1 then return {err = 'GAP'} end
redis.call('SET', KEYS[1], text(sequence), 'PX', 86400000)

local function taken(b)
  local total = 0
  for _, amount in pairs(b.own) do total = total + amount end
  return total
end
local function begin(b, stamp, level)
  b.level, b.stamp, b.birth, b.own, b.before = level, stamp, now, {}, 0
end
local pass = {}
function pass.running() end
function pass.bucket(b)  -- it is refilled by whole intervals
  local steps = math.floor((now - b.stamp + 2) / b.interval)
  if steps > 0 then
    b.level = b.level + steps * b.refill
    b.stamp = b.stamp + steps * b.interval
  end
  if b.level >= b.room then begin(b, now, b.room) end
  b.full_in = math.ceil((b.room - b.level) / b.refill) * b.interval + b.stamp - now
end
function pass.window(b)  -- it begins with its first call
  if b.level >= b.capacity or now - b.stamp + 2 >= b.interval then
    begin(b, now, math.max(b.level, b.capacity))
  end
  b.full_in = b.stamp + b.interval - now
end
function pass.date(b)  -- a day, a week or a month; clocks of processes may be off by 2 s
  if math.abs(b.stamp - b.began) > 2000000 then
    begin(b, b.began, math.max(b.level, b.capacity))
  end
  b.stamp, b.full_in = b.began, b.ends - now
end

local function read_figures()
  local figures = {kind = words(), capacity = number()}
  if figures.kind == 'bucket' then figures.refill, figures.interval = number(), number() end
  if figures.kind == 'window' then figures.interval = number() end
  if figures.kind == 'date' then
    local before, began, ends, after = number(), number(), number(), number()
    if now < began then began, ends = before, began end
    if now >= ends then began, ends = ends, after end
    figures.began, figures.ends = began, ends
  end
  return figures
end
local function read_running(b, text)
  b.stamp, b.birth, b.ends = now, 0, {}
  for process, count, ends in string.gmatch(text, '(%S+) (%d+) (%d+)') do
    if tonumber(ends) > now then b.own[process], b.ends[process] = tonumber(count), ends end
  end
  b.room, b.level = b.capacity, b.capacity - taken(b)
end
local function read(figures, text)
  local b = setmetatable({given = {}, own = {}, extra = 0}, {__index = figures})
  if b.kind == 'running' then
    read_running(b, text)
    return b
  end
  local head, rest = string.match(text, '^([^|]*)|?(.*)$')
  local numbers = {}
  for word in string.gmatch(head, '%S+') do numbers[#numbers + 1] = tonumber(word) end
  for process, amount in string.gmatch(rest, '(%S+)=(%S+)') do
    b.own[process] = tonumber(amount)
  end
  for i = 4, #numbers - 1, 2 do
    if numbers[i + 1] > now then
      b.given[#b.given + 1] = {numbers[i], numbers[i + 1]}
      b.extra = b.extra + numbers[i]
    end
  end
  b.room = b.capacity + b.extra
  b.level = math.min(b.room, numbers[1] or b.room)
  b.stamp, b.birth = numbers[2] or b.began or now, numbers[3] or now
  b.known, b.before = numbers[1], b.own[me] or 0
  return b
end
local figures, buckets = {}, {}
for i = 1, #KEYS - 1 do
  figures[i] = read_figures()
  buckets[i] = read(figures[i], found[i + 1] or '')
  pass[buckets[i].kind](buckets[i])
end

local function charge(b, amount, age)
  if b.kind == 'running' then amount = math.max(amount, -(b.own[me] or 0))
  elseif amount < 0 and b.was_full and now - age < b.birth then return  -- it may be done already
  elseif amount > 0 and b.kind == 'window' then
    if age + 2 >= b.interval then return end
    if b.level >= b.capacity then b.stamp = now - age end  -- it began while Redis was away
  elseif b.kind ~= 'bucket' and now - age + 2 < b.stamp then return end
  local level = math.min(b.room, b.level - amount)
  b.own[me] = (b.own[me] or 0) + b.level - level
  b.level, b.changed = level, true
end
local function take(wanted)
  for i = 1, #wanted do
    if wanted[i][1].level < wanted[i][2] then return '0' end
  end
  for i = 1, #wanted do
    if wanted[i][2] ~= 0 then charge(wanted[i][1], wanted[i][2], 0) end
  end
  return '1'
end
local function merge(b, told)
  local credit, other = b.level + taken(b), told.level + taken(told)
  if told.extra > b.extra then b.given, b.extra, b.room = told.given, told.extra, told.room end
  for process, amount in pairs(told.own) do b.own[process] = b.own[process] or amount end
  if other >= credit then credit, b.stamp = other, told.stamp end
  b.birth = math.min(b.birth, told.birth)
  b.level, b.changed = math.min(b.room, credit - taken(b)), true
end
local flags, act = {}, {}
function act.take()
  local wanted = {}
  for i = 1, number() do wanted[i] = {buckets[number()], number()} end
  flags[#flags + 1] = take(wanted)
end
function act.charge() charge(buckets[number()], number(), number()) end
function act.give()  -- once, which its end tells
  local b, amount, ends = buckets[number()], number(), number()
  for _, one in ipairs(b.given) do if one[2] == ends then return end end
  b.given[#b.given + 1] = {amount, ends}
  b.extra, b.room, b.level = b.extra + amount, b.room + amount, b.level + amount
  b.changed = true
end
function act.count()
  local b, count = buckets[number()], number()
  charge(b, count - (b.own[me] or 0), 0)
end
-- What this process saw last: 'own' is its part, 'back' all that was lost, 'new' counts where there
-- is nothing yet.
function act.put()
  local i, what, told = number(), words(), string.gsub(words(), ',', ' ')
  local b = buckets[i]
  if what == 'new' and b.known then return end
  told = read(figures[i], told)
  local birth, own = told.birth, told.own[me] or 0
  pass[b.kind](told)
  if what ~= 'own' and (told.level < told.room or told.extra > 0) then merge(b, told) end
  if b.birth > birth then own, b.was_full = 0, true end  -- meanwhile
  if b.own[me] then charge(b, own - b.own[me], 0) end
  b.before = b.own[me] or 0
end
function act.renew() buckets[number()].changed = true end
function act.look() number() end
for word in words do act[word]() end

local function save_running(b, key)
  local rows = {}
  b.ends[me] = text(now + 30000000)
  for process, count in pairs(b.own) do
    if count > 0 then rows[#rows + 1] = process .. ' ' .. text(count) .. ' ' .. b.ends[process] end
  end
  if #rows == 0 then return redis.call('DEL', key) end
  redis.call('SET', key, table.concat(rows, ' '), 'PX', 30001)
end
local function spell(b)
  local parts = {text(b.level), string.format('%.3f', b.stamp), text(b.birth)}
  for _, one in ipairs(b.given) do parts[#parts + 1] = text(one[1]) .. ' ' .. text(one[2]) end
  parts[#parts + 1] = '|'
  local count = 0
  for process, amount in pairs(b.own) do
    parts[#parts + 1] = process .. '=' .. text(amount)
    count = count + 1
  end
  if count <= 100 then return table.concat(parts, ' ') end
  -- Most of these are long dead; the others begin anew, as where the bucket was full.
  local fresh = (b.own[me] or 0) - b.before
  b.own, b.birth = {[me] = fresh, ['-'] = taken(b) - fresh}, now
  return spell(b)
end
local function save(b, key)
  if b.kind == 'running' then return save_running(b, key) end
  pass[b.kind](b)
  if b.level >= b.room and b.extra == 0 then return redis.call('DEL', key) end
  local length = b.full_in
  for _, one in ipairs(b.given) do length = math.max(length, one[2] - now) end
  length = math.min(34560000000, math.floor(length / 1000) + 1000)
  redis.call('SET', key, spell(b), 'PX', text(length))
end
local answer = {table.concat(flags) .. ' ' .. text(now)}
for i, b in ipairs(buckets) do
  if b.changed then save(b, KEYS[i + 1]) end
  if b.kind == 'running' then b.own = {} end
  answer[i + 1] = spell(b)
end
return table.concat(answer, '\\n')
"""

# Tells that a process is there. KEYS[2] are all that are; returns whether there were any, how many
# there are, the number of the last batch of this one, and the time. ARGV[2], if any, is the number
# from which it goes on.
LUA_BEAT = LUA_TIME + """
local existed = redis.call('EXISTS', KEYS[2])
redis.call('ZADD', KEYS[2], string.format('%.0f', now), ARGV[1])  -- first: it needs memory
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', string.format('%.0f', now - 2500000))
local last = redis.call('GET', KEYS[1]) or '0'
if ARGV[2] then redis.call('SET', KEYS[1], ARGV[2]) end
redis.call('PEXPIRE', KEYS[1], 86400000)
return {existed, redis.call('ZCARD', KEYS[2]), last, string.format('%.0f', now)}
"""


# Fills some buckets, and goes on where SCAN does: ARGV are where, and what their names are like.
# What was given beyond the rule stays.
LUA_FILL = """
local cursor, keys = unpack(redis.call('SCAN', ARGV[1], 'MATCH', ARGV[2], 'COUNT', 1000))
for _, key in ipairs(keys) do
  local stamp, given = string.match(redis.call('GET', key) or '', '^%S+ (%S+ %S+)( %d[^|]*)')
  if given then
    local length = math.max(1, redis.call('PTTL', key))
    redis.call('SET', key, '9000000000000000 ' .. stamp .. given, 'PX', length)
  else
    redis.call('DEL', key)
  end
end
return cursor
"""


class Take(NamedTuple):
    """What one call would take of its buckets. `future` gets the levels when Redis has answered, a
    RedisFault when the call waits no longer."""
    keyed_rules: KeyedRules
    costs: Costs
    future: asyncio.Future


class Batch:
    """What one run of LUA_BATCH does: acts (word, rule, bucket, arguments ...), charges ((bucket,
    ...), rule, amount, since when), and takes."""

    def __init__(self, acts: List[Tuple], charges: Sequence[Tuple] = (), takes: List[Take] = ()):
        self.acts = acts
        self.charges = charges
        self.takes = takes
        self.rules = {}    # of all buckets that it needs, by bucket
        self.numbers = {}  # of these buckets

    def number_of(self, rule, key):
        self.rules[key] = rule
        return self.numbers.setdefault(key, len(self.rules))

    def words(self, now: float) -> Iterable[str]:
        """Yields the acts, as LUA_BATCH reads them."""
        for word, rule, key, *arguments in self.acts:
            yield "%s %d %s" % (word, self.number_of(rule, key), " ".join(map(str, arguments)))
        for (key, _), rule, amount, since in self.charges:
            age = microseconds(now - since)
            yield "charge %d %d %d" % (self.number_of(rule, key), amount, age)
        for keyed_rules, costs, _ in self.takes:
            wanted = ["%d %d" % (self.number_of(rule, key), stored_amount(rule, costs[rule.unit]))
                      for rule, key in keyed_rules]
            yield "take %d %s" % (len(wanted), " ".join(wanted))


def grain(rule: Rule) -> int:
    """Returns the smallest amount of a unit that Redis counts."""
    return NANODOLLAR if rule.unit == USD else 1


def stored_amount(rule: Rule, amount: int) -> int:
    """Returns an amount as Redis has it: of money in nanodollars, rounded up."""
    return -(-amount // grain(rule))


def microseconds(seconds: float) -> int:
    return int(seconds * 1_000_000)


def short_digest(thing: Union[str, CallerKey]) -> str:
    return hashlib.sha256(repr(thing).encode()).hexdigest()[:16]


@lru_cache(20_000)
def bucket_name(kind: str, key: BucketKey) -> str:
    return "%s:%s:%s" % (kind, ".".join(map(short_digest, key[1:])), short_digest(key[0]))


period_of = lru_cache(1000)(calendar_rule)


@lru_cache(1000)
def describe_kind(rule: Rule, hour: float) -> str:
    """Returns the kind of a bucket and its figures, in the words of LUA_BATCH. Those of a date hold
    for this hour since 1970, and longer."""
    scale = grain(rule)
    capacity = rule.capacity // scale
    if rule.unit == RUNNING:
        return f"running {capacity}"
    if rule.zone:
        now = calendar_rule(rule, 3600 * hour)
        ends = now.began + now.interval
        after = calendar_rule(rule, ends + 1)
        dates = (calendar_rule(rule, now.began - 1).began, now.began, ends,
                 after.began + after.interval)
        return "date %d %d %d %d %d" % (
            capacity, *[microseconds(date - START_OF_2020) for date in dates])
    if rule.window:
        return "window %d %d" % (capacity, rule.interval * 1_000_000)
    refill = max(1, rule.refill // scale)
    return "bucket %d %d %.6f" % (
        capacity, refill, rule.interval * 1_000_000 * refill * scale / rule.refill)


@lru_cache(1000)
def share_of(rule: Rule, processes: int) -> Rule:
    """Returns a rule for one of so many processes that together keep to the given one."""
    amount, seconds = rule.rate
    return rule._replace(
        capacity=max(1, rule.capacity // processes), rate=(max(1, amount // processes), seconds),
        interval=rule.interval if rule.window else rule.interval * processes)


class RedisBuckets(Buckets):
    """Every bucket of every rule, in Redis. The levels last seen are kept here, too: for headers
    and pages, to put back what Redis loses, and to go on by while Redis is away.

    The takes and charges of one pass of the loop are sent as a batch. Levels in an answer are
    without what is pending: charges made here that Redis has not answered. Where an answer does not
    come, this process's part of the buckets is set back to what it saw, and all is sent again."""
    MOST_BATCHES = 32         # without an answer
    MOST_ACTS = 200           # acts in one batch
    MOST_KEPT = 20_000        # acts, and charges, that are not sent yet
    CHARGE_SECONDS = 0.005
    SLACK_SECONDS = 1         # by which times of this process and of Redis may differ
    DRAIN_SECONDS = 2         # to have all answered when the process ends
    BEAT_SECONDS = 0.5
    START_BEATS = 3           # until all processes that were started together are counted
    RENEW_BEATS = 20          # of running calls, which Redis forgets after 30 s
    LOOKS = 50                # buckets whose level is asked for with each beat
    state = "returning"       # or "here", or "away"
    reason = "is not there"
    number = 0                # of the last batch that was sent,
    done = 0                  # and answered
    is_lost = False           # something that Redis knew, and is not told yet
    unanswered = 0            # batches
    beats = 0
    replaces_dead = False     # a process that died: nobody knows what it took of its share
    charging: Optional[asyncio.TimerHandle] = None
    beat_timer: Optional[asyncio.TimerHandle] = None
    filling: Optional[asyncio.Task] = None

    def __init__(self, clock: Any, redis: Redis, prefix: str, policy: str, peers: int):
        super().__init__(clock)
        self.redis = redis
        self.policy = policy
        self.processes = peers
        self.counts = deque([peers], maxlen=4)
        self.prefix = "{%s}:" % prefix  # of a cluster, one node has all that has this
        self.marker = self.prefix + "p:" + redis.process
        # How far its clock, which begins in 2020, is ahead of the monotonic one.
        self.ahead = wall_time(clock) - START_OF_2020 - clock.monotonic()
        self.batch_script, self.beat_script = RedisScript(LUA_BATCH), RedisScript(LUA_BEAT)
        # (bucket, when it was taken for what an earlier window gets back, else 0) -> (rule, amount,
        # since when)
        self.unsent = {}
        self.pending = Counter()  # amounts that were charged here, of which there is no answer yet
        self.running = Counter()  # calls of this process, by (rule, bucket)
        # (word of LUA_BATCH, rule, bucket, arguments ...)
        self.acts = deque(maxlen=self.MOST_KEPT)
        self.unsure = {}  # rules, by bucket, of what was sent in vain, or answered in vain
        self.fills = set()                  # callers whose buckets are to be filled
        self.texts = {}         # what Redis told of each bucket
        self.takes = deque()    # to be sent
        self.local = Buckets(clock)  # what this process may use while Redis is away
        # Is told that it is "away", "again" there, or "there" since the start.
        self.on_change = lambda change: None
        redis.scripts += [self.batch_script, self.beat_script]
        redis.on_flush.append(self.flush)
        redis.on_connect.append(self.catch_up)
        redis.on_return.append(self.come_back)
        redis.on_leave.append(self.on_leave)

    @property
    def is_degraded(self) -> bool:
        return self.state == "away"

    def health(self):
        return {"limits": {"shared_by": self.processes, "degraded": self.is_degraded,
                           "redis": self.reason, "dropped": self.redis.dropped}}

    # -- what Buckets does

    async def take(self, keyed_rules, costs):
        redis, levels = self.redis, None
        if self.state != "away" and not redis.is_late():
            take = Take(keyed_rules, costs, redis.loop.create_future())
            self.takes.append(take)
            redis.flush_soon()
            try:
                levels = await redis.wait(take.future)
            except asyncio.CancelledError:
                if not take.future.cancelled():  # Redis has answered in this pass of the loop
                    self.give_back(take.future.result())
                raise
        if type(levels) is not list:
            return self.take_locally(keyed_rules, costs)
        return tightest_of(levels), levels

    def settle(self, keyed_rules, costs, taken, taken_at):
        tightest = super().settle(keyed_rules, costs, taken, taken_at)
        for rule, key in keyed_rules:
            unit = rule.unit
            if costs[unit] != taken[unit]:
                amount = stored_amount(rule, costs[unit]) - stored_amount(rule, taken[unit])
                self.charge(rule, key, amount, taken_at)
        if self.local.levels:  # Redis is away, or late
            return self.local.settle(self.local_rules(keyed_rules), costs, taken, taken_at)
        return tightest

    def give(self, rule, key, amount, until, again=False):
        """Gives a bucket more in Redis. It is noted here with the answer, as a loss would else give
        it twice."""
        if again:
            super().give(rule, key, amount, until, again)
        else:
            self.act("give", rule, key, stored_amount(rule, amount),
                     microseconds(until + self.ahead))

    def fill(self, owner):
        super().fill(owner)
        self.fills.add(owner)

    def restore(self, rule, key, level, since):
        is_new = key not in self.levels
        super().restore(rule, key, level, since)
        if is_new and self.state == "here":
            self.act("put", rule, key, "new", self.spell(self.levels[key]))

    def drop(self, keys):
        gone = set(keys)
        super().drop(gone)
        for key in gone:
            self.texts.pop(key, None)
        self.acts = deque(
            [act for act in self.acts if act[0] == "give" or act[2] not in gone],
            self.MOST_KEPT)

    def is_full(self, bucket):
        """What this process has taken of a bucket must be known until Redis tells that it is
        full: it would else be set back to nothing where an answer is lost."""
        return "=" not in self.texts.get(bucket.key, "") and super().is_full(bucket)

    # -- what is asked of Redis

    def act(self, *act):
        self.redis.dropped += len(self.acts) == self.MOST_KEPT
        self.acts.append(act)
        self.redis.flush_soon()

    def charge(self, rule, key, amount, taken_at=0.0):
        """Charges so much soon, with the next batch or, after CHARGE_SECONDS, alone."""
        self.note_running(rule, key, amount)
        place, now = (key, 0.0), self.clock.monotonic()
        _, before, since = self.unsent.get(place, (rule, 0, now))
        known = self.levels.get(key)
        if rule.window and known and since + self.SLACK_SECONDS < known.refilled:
            self.pending[key] -= before  # of a window that is over
            self.unsent.pop(place, None)
            since = now
        if rule.window and amount < 0 and taken_at < since:
            place, since = (key, taken_at), taken_at
        if len(self.unsent) >= self.MOST_KEPT and place not in self.unsent:
            self.redis.dropped += 1
            return
        self.pending[key] += amount
        self.send(place, rule, amount, since)
        if not self.charging:
            self.charging = self.redis.loop.call_later(self.CHARGE_SECONDS, self.redis.flush)

    def send(self, place, rule, amount, since):
        _, before, earlier = self.unsent.get(place, (rule, 0, since))
        self.unsent[place] = rule, before + amount, min(earlier, since)

    def note_running(self, rule, key, amount):
        if rule.unit == RUNNING:
            self.running[rule, key] += amount
            if not self.running[rule, key]:
                del self.running[rule, key]

    def flush(self):
        """Sends what waits in batches, of which at most MOST_BATCHES have no answer. Charges come
        before takes, which may have what they give back."""
        if self.charging:
            self.charging.cancel()
            self.charging = None
        for _ in range(self.MOST_BATCHES - self.unanswered):
            if not (self.state == "here" and self.redis.available
                    and (self.takes or self.unsent or self.acts)):
                break
            self.send_batch()

    def send_batch(self):
        """Sends what one batch may have of what waits. What is put back comes before all charges
        and takes, if possible with them: else others could tell of these meanwhile, too."""
        acts, charges, takes = self.first_of(self.acts), [], []
        if not self.acts:
            charges = [(place, *self.unsent.pop(place))
                       for place in list(islice(self.unsent, self.MOST_ACTS))]
            takes = [take for take in self.first_of(self.takes) if not take.future.done()]
        batch = Batch(acts, charges, takes)
        self.unanswered += 1
        command = self.command(batch)
        self.redis.ask(partial(self.on_answer, batch, self.number), *command)

    def first_of(self, queue):
        return [queue.popleft() for _ in range(min(len(queue), self.MOST_ACTS))]

    async def drain(self, say: Callable[[str], None]):
        """Waits until Redis has all, for DRAIN_SECONDS at most."""
        end = self.redis.loop.time() + self.DRAIN_SECONDS
        while self.unanswered or self.acts or self.unsent:
            if self.redis.loop.time() > end:
                return say(f"Redis is not told of all charges: it {self.reason}")
            self.redis.flush_soon()
            await asyncio.sleep(0.01)

    def describe(self, rule, key):
        """Returns the name of a bucket in Redis, its kind and figures."""
        hour = wall_time(self.clock) // 3600 if rule.zone else 0
        name = bucket_name("r" if rule.unit == RUNNING else "b", key)
        return self.prefix + name, describe_kind(rule, hour)

    def command(self, batch):
        """Returns the command that does a batch, which is the next one."""
        self.number += 1
        acts = list(batch.words(self.clock.monotonic()))
        buckets = [self.describe(rule, key) for key, rule in batch.rules.items()]
        words = [str(self.number), *[kind for _, kind in buckets], *acts]
        return self.batch_script.parts([self.marker, *[name for name, _ in buckets]],
                                       [self.redis.process, " ".join(words)])

    # -- what Redis answers

    def on_answer(self, batch, number, reply):
        self.unanswered -= 1
        if isinstance(reply, RedisFault):
            self.take_back(batch)
            return self.redis.leave_if_refused(reply)
        self.done = number
        try:
            self.read_answer(batch, *reply.decode().split("\n"))
        except (AttributeError, ValueError, OverflowError):  # somebody else has written there
            self.redis.give_up()
            self.redis.leave(RedisFault("has other things under these names"))
        if not self.charging:  # what there is was too much for one batch
            self.redis.flush_soon()

    def take_back(self, batch):
        """Has all of a batch sent again: it was lost, or its answer was. Before, this process's
        part of the buckets is set back, so it is done once."""
        self.unsure.update(batch.rules)
        self.acts.extend(batch.acts)  # of which catch_up keeps some
        for charge in batch.charges:
            self.send(*charge)
        self.takes.extend(batch.takes)

    def read_answer(self, batch, first, *texts):
        flags, now = first.rsplit(" ", 1)
        self.note_time(int(now))
        for (key, _), _, amount, _ in batch.charges:
            self.pending[key] -= amount
            if not self.pending[key]:
                del self.pending[key]
        levels = {key: self.note_level(rule, key, text)
                  for (key, rule), text in zip(batch.rules.items(), texts)}
        for take, flag in zip(batch.takes, flags):
            self.finish_take(take, flag == "1", levels)

    def note_time(self, redis_time):
        self.ahead = redis_time / 1_000_000 - self.clock.monotonic()

    def note_level(self, rule, key, text):
        """Keeps the level of a bucket less what is pending; returns the level that Redis told."""
        head, _, _ = text.partition("|")
        level, stamp, _, *given = [int(float(word)) for word in head.split()]
        now, scale = self.clock.monotonic(), grain(rule)
        refilled = stamp / 1_000_000 - self.ahead
        if rule.zone:
            rule = period_of(rule, stamp // 1_000_000 + START_OF_2020 + 1)
        self.texts[key] = text.replace(" ", ",")
        self.given.pop(key, None)
        self.local.levels.pop(key, None)  # which was its share of what was seen before
        if given:
            self.given[key] = [(amount * scale, until / 1_000_000 - self.ahead)
                               for amount, until in zip(given[::2], given[1::2])]
        pending = self.pending.get(key, 0)
        self.store([Level((level - pending) * scale, refilled, rule, key, 0, now)])
        return Level(level * scale, refilled, rule, key, 0, now)

    def finish_take(self, take, taken, redis_levels):
        """Completes a take as Redis decided, or gives it back if nobody waits for it any longer."""
        levels = []
        for rule, key in take.keyed_rules:
            cost = take.costs[rule.unit]
            level = redis_levels[key]
            levels.append(level._replace(amount=cost) if taken else level.less(cost))
            if taken:
                self.note_running(rule, key, cost)
        if take.future.done():
            self.give_back(levels)
        else:
            take.future.set_result(levels)

    def give_back(self, levels):
        """Gives back what Redis has let a call take that waits no longer."""
        if type(levels) is list and tightest_of(levels).level >= 0:
            for one in levels:
                amount = stored_amount(one.rule, one.amount)
                self.charge(one.rule, one.key, -amount, one.now)

    # -- while Redis is away

    def take_locally(self, keyed_rules, costs):
        """Decides a take without Redis, by the policy for that. Raises LimitsAway."""
        if self.policy == "closed":
            raise LimitsAway
        if self.policy == "open":
            levels = [level._replace(level=max(0, level.level))
                      for level in self.levels_after(keyed_rules, costs, NO_COST)]
        else:
            levels = self.local.levels_after(self.local_rules(keyed_rules), costs, NO_COST)
        tightest = tightest_of(levels)
        if tightest.level >= 0:
            self.settle(keyed_rules, costs, NO_COST, 0.0)
            tightest = tightest._replace(now=self.clock.monotonic())  # later than its windows
        return tightest, levels

    def local_rules(self, keyed_rules):
        """Returns the rules for the share of this process. A local bucket that is new begins with
        the share of the level last seen."""
        keyed_shares = []
        for rule, key in keyed_rules:
            share = share_of(rule, self.processes)
            keyed_shares.append((share, key))
            if key not in self.local.levels:
                seen = self.level_of(rule, key)
                level = seen.level // self.processes
                if rule.unit == RUNNING:
                    level = share.capacity - self.running[rule, key]
                elif self.replaces_dead and key not in self.levels:
                    level = 0
                self.local.store([seen._replace(level=level, rule=share._replace(
                    began=seen.rule.began, interval=share.interval))])
        return keyed_shares

    def on_leave(self, fault):
        """Notes that the connection was lost, or that a new one failed: only then Redis is away. A
        node of a cluster that sends us to another one has not failed."""
        self.reason = str(fault)
        if self.state == "here":
            self.state = "returning"
            self.beat_timer.cancel()
        elif self.state == "returning" and not fault.moved_to:
            self.state = "away"
            self.on_change("away")
            self.redis.give_up()

    # -- when it is back

    async def catch_up(self):
        """Sets this process's part of each bucket back to what it saw, as answers may be missing;
        puts back all that it saw if Redis has lost some. Raises RedisFault."""
        self.number += 1
        was_lost, self.is_lost = self.is_lost, self.done > 0  # it is told once, maybe in vain
        existed, last = self.read_beat(
            await self.redis.ask_and_wait(*self.beat_parts(self.number)))
        self.is_lost = was_lost or (last < self.done if self.done else not existed)
        self.done = self.number
        kept = [act for act in self.acts if act[0] == "give" or "new" in act]
        self.acts.clear()
        self.acts.extend([*self.what_was_seen(), *kept])
        while self.acts:
            self.send_batch()
            await self.redis.ask_and_wait(*self.beat_parts())  # answered after the batch

    def what_was_seen(self):
        """Yields acts that put this process's part of each bucket back; what is sent again after
        that comes last."""
        running = {key: rule for rule, key in self.running}
        seen = {one.key: one.rule for one in self.seen() if one.key not in self.unsure}
        for key, rule in {**running, **seen, **self.unsure}.items():
            if rule.unit == RUNNING:
                yield "count", rule, key, self.running[rule, key] - self.pending.get(key, 0)
            else:
                text = self.texts.get(key) or self.spell(self.level_of(rule, key))
                yield "put", rule, key, "back" if self.is_lost else "own", text

    def spell(self, one):
        """Returns the text of a bucket that Redis has told nothing of: somebody has taken what is
        missing."""
        rule, key = one.rule, one.key
        level = stored_amount(rule, one.level) + self.pending.get(key, 0)  # Redis knows none of it
        given = [(stored_amount(rule, amount), microseconds(until + self.ahead))
                 for amount, until in self.given.get(key, ())]
        full = rule.capacity // grain(rule) + sum([amount for amount, _ in given])
        began = rule.began - START_OF_2020 if rule.zone else one.refilled + self.ahead
        numbers = level, microseconds(began), 0, *chain(*given)
        return "%s|-=%d" % (",".join(map(str, numbers)), full - level)

    def come_back(self):
        was_away = self.state == "away"
        self.state = "here"
        self.reason = "is there"
        self.replaces_dead = False
        self.is_lost = False
        self.unsure = {}
        self.local = Buckets(self.clock)
        if was_away:
            self.on_change("again")
        self.redis.flush_soon()
        self.beat()

    def beat_parts(self, *number):
        return self.beat_script.parts(
            [self.marker, self.prefix + "processes"], [self.redis.process, *number])

    def beat(self):
        """Tells Redis that this process is alive, and learns whether Redis has lost what it
        knew."""
        self.beat_timer = self.redis.loop.call_later(self.BEAT_SECONDS, self.beat)
        self.beats += 1
        if self.beats == self.START_BEATS:
            self.on_change("there")
        if self.beats % self.RENEW_BEATS == 0:
            for pair in self.running:
                self.act("renew", *pair)
        for one in list(islice(self.levels.values(), self.LOOKS)):
            self.act("look", one.rule, one.key)  # what others took; it is the last one afterwards
        self.redis.ask(partial(self.on_beat, self.number), *self.beat_parts())
        if self.fills and (self.filling is None or self.filling.done()):
            self.filling = self.redis.loop.create_task(self.fill_all(), name="fills buckets")

    def read_beat(self, reply):
        """Returns whether anybody was there before, and the last batch that was done. Where Redis
        has lost who is there, the others tell soon. Raises RedisFault."""
        try:
            existed, count, last, now = map(int, reply)
        except (TypeError, ValueError):
            raise RedisFault("answers with nonsense") from None
        self.counts.append(count)
        self.processes = max(self.counts)
        self.note_time(now)
        return existed, last

    def on_beat(self, number, reply):
        if isinstance(reply, RedisFault):
            return self.redis.leave_if_refused(reply)
        try:
            _, last = self.read_beat(reply)
            if last != number:
                raise RedisFault("has lost what it knew")
        except RedisFault as fault:
            self.redis.leave(fault)

    async def fill_all(self):
        """Fills the buckets of the callers in `fills`; a later beat goes on where Redis fails."""
        with suppress(RedisFault):
            for owner in list(self.fills):
                pattern_of_names = "%sb:*%s*:*" % (self.prefix, short_digest(owner))
                cursor = 0
                while cursor != b"0":
                    self.redis.begin_call()
                    cursor = await self.redis.call(
                        "EVAL", LUA_FILL, 1, self.prefix, cursor, pattern_of_names)
                self.fills.discard(owner)


# Tells how many calls of a process run at an upstream, and returns how many more may, and how many
# run elsewhere: KEYS are how many run by process, and until when that holds; the processes that
# wait for a slot (since when), those that asked lately, and since when there are any of these. Who
# has waited for longer comes first. ARGV are how many slots there are, how long what is told holds,
# the process, how many run, how many it wants, how long it has waited, how many more it may have
# before all have told of theirs, and how long that takes. Times are in milliseconds.
LUA_SLOTS = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local process, running, wanted = ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5])
for _, one in ipairs(redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', now)) do
  redis.call('ZREM', KEYS[2], one)
  redis.call('ZREM', KEYS[3], one)
end
redis.call('ZREM', KEYS[2], process)
local since = now - ARGV[6]
local room, elsewhere = ARGV[1] - running, 0
room = room - redis.call('ZCOUNT', KEYS[2], '-inf', '(' .. since)
local rows = redis.call('HGETALL', KEYS[1])
for i = 1, #rows, 2 do
  local count, ends = string.match(rows[i + 1], '(%d+) (%d+)')
  if tonumber(ends) <= now then redis.call('HDEL', KEYS[1], rows[i])
  elseif rows[i] ~= process then elsewhere = elsewhere + count end
end
room = room - elsewhere
local began = redis.call('GET', KEYS[4]) or now  -- now where Redis has lost what it knew
redis.call('SET', KEYS[4], began, 'PX', 100 * ARGV[2])
if now - began < tonumber(ARGV[8]) then room = math.min(room, ARGV[7]) end
local given = math.max(0, math.min(wanted, room))
if running + given > 0 then
  redis.call('HSET', KEYS[1], process, string.format('%d %.0f', running + given, now + ARGV[2]))
else
  redis.call('HDEL', KEYS[1], process)
end
if given < wanted then
  redis.call('ZADD', KEYS[2], since, process)
  redis.call('ZADD', KEYS[3], now + 200, process)
end
for i = 1, 3 do redis.call('PEXPIRE', KEYS[i], ARGV[2]) end
return {given, elsewhere}
"""


class SharedQueue(FairQueue):
    """A fair queue before slots that all processes share: each tells Redis how many calls it runs,
    and asks for slots for those that come. `most` is how many may run here now; while Redis is
    away, its part of all. What a process has told holds for a while only, so the slots of one that
    died come back."""
    HOLDS_MS = 30_000
    TELL_MS = 1000       # until all have told of their slots, when Redis has lost them
    POLL_SECONDS = 0.01  # between two questions, while calls wait
    AT_ONCE = 32         # slots that are asked for at once
    short = False
    elsewhere = 0        # how many ran in other processes when Redis told
    answered: Optional[asyncio.Future] = None  # while it asks
    timer: Optional[asyncio.TimerHandle] = None

    def __init__(self, most: int, limits: QueueLimits, clock: Any, redis: Redis, name: str,
                 part: Callable[[int], int]):
        """`name` is what the keys in Redis begin with; `part` tells what this process has of so
        many while Redis is away."""
        super().__init__(0, limits, clock)
        self.all = most
        self.redis = redis
        self.part = part
        self.script = RedisScript(LUA_SLOTS)
        redis.scripts.append(self.script)
        redis.on_return.append(self.begin)
        redis.on_leave.append(lambda fault: self.go_alone())
        self.keys = [name + end for end in (":taken", ":line", ":asking", ":began")]

    def slots(self) -> int:
        return self.all

    def enter(self, key: CallerKey, weight: int, waited: float = 0) -> Ticket:
        ticket = super().enter(key, weight, waited)
        if not ticket.running:
            self.tell_soon()
        return ticket

    def leave(self, ticket: Ticket):
        """Leaves the queue, and gives the slot back to whoever has waited longest in any
        process."""
        if self.redis.available:
            self.most = self.running - ticket.running
        super().leave(ticket)
        self.tell_soon()

    def tell_soon(self):
        if self.redis.available and self.answered is None:
            if self.timer:
                self.timer.cancel()
            self.answered = self.redis.loop.create_future()
            self.redis.loop.call_soon(self.tell)  # more may come in this pass of the loop

    def tell(self):
        """Tells how many calls run, and asks for a slot for each that waits."""
        running, waiting = self.running, self.waiting()
        wanted = min(len(waiting), self.AT_ONCE)
        age = max([ticket.waited() for ticket in waiting], default=0)
        answered = self.answered
        answered.add_done_callback(partial(self.on_answer, running, wanted))
        self.redis.limit_wait(answered)
        self.redis.ask(lambda reply: answered.done() or answered.set_result(reply),
                       *self.script.parts(self.keys, [
                           self.all, self.HOLDS_MS, self.redis.process, running, wanted, age,
                           self.part(self.all) - running, self.TELL_MS]))

    def on_answer(self, running, wanted, answered):
        self.answered = None
        reply = answered.result()
        if isinstance(reply, RedisFault):  # it may have given some, until it is told again
            given = 0
            self.short = True  # there may be too few slots: ask again
            self.redis.leave_if_refused(reply)
            if self.redis.available:
                self.take(min(self.part(self.all), self.all - self.elsewhere) - self.running)
        else:
            given, self.elsewhere = reply
            self.take(given)
            self.short = given < wanted
        if self.short:
            self.limits.shrink()  # who may wait counts only now
            self.timer = self.redis.loop.call_later(self.POLL_SECONDS, self.tell_soon)
        if self.running != running + given or (self.waiting() and not self.short):
            self.tell_soon()

    def take(self, count):
        """Starts so many more calls, if any; some that wanted a slot may have left."""
        self.most = self.running + max(0, count)
        for _ in range(count):
            self.start_next()
        self.most = self.running

    def begin(self):
        """Claims slots for the calls that run here, even too many: Redis is there."""
        self.take(0)
        self.short = False
        self.tell_soon()

    def go_alone(self):
        """Goes on with a part of the slots, beside those it has: Redis is away."""
        self.take(self.part(self.all) - self.running)
        self.most = self.part(self.all)
        self.short = True


# Keeps what is newer, and returns all where that is not what the process knows: KEYS are a hash
# and how often it was changed, ARGV how often it was when the process read it, then a name, when
# that was changed, and the text, of each.
LUA_KEYS = """
for i = 2, #ARGV, 3 do
  local old = redis.call('HGET', KEYS[1], ARGV[i]) or ''
  if (tonumber(string.match(old, '%S+')) or 0) < tonumber(ARGV[i + 1]) then
    redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1] .. ' ' .. ARGV[i + 2])
    redis.call('INCR', KEYS[2])
  end
end
local changes = redis.call('GET', KEYS[2]) or ''
return changes ~= ARGV[1] and {changes, redis.call('HGETALL', KEYS[1])}
"""


class SharedKeys:
    """Keeps stored keys alike on all boxes: each has all of them in its DATABASE, by which it goes
    on while Redis is away. The last change of a key counts, by the clocks of the boxes."""
    LOOK_SECONDS = 0.3
    AT_ONCE = 200      # keys that are told

    def __init__(self, redis: Redis, prefix: str, ledger: Ledger):
        self.redis = redis
        self.names = prefix + "keys", prefix + "keys:changes"
        self.heard = ledger.records = deque()
        self.here = {}   # KeyRecords
        self.news = {}   # of these, those that the others may not have
        redis.on_return.append(self.begin)
        redis.loop.call_soon(self.exchange)
        ledger.on_records = partial(soon, redis.loop, self.note)

    def note(self, records: KeyRecords):
        """Notes the keys that this box has."""
        self.news.update({name: one for name, one in records.items() if self.here.get(name) != one})
        self.here = records

    def begin(self):
        """Has all keys exchanged, as Redis may have lost them."""
        self.changes = b"?"
        self.news = dict(self.here)

    def exchange(self):
        self.redis.loop.call_later(self.LOOK_SECONDS, self.exchange)
        if self.redis.available:  # before, it may not be the database that is meant
            records = [(name, *self.news.pop(name))
                       for name in list(islice(self.news, self.AT_ONCE))]
            self.redis.ask(self.on_keys, "EVAL", LUA_KEYS, 2, *self.names, self.changes,
                           *chain(*records))

    def on_keys(self, reply):
        if isinstance(reply, RedisFault):
            self.begin()
        if type(reply) is not list:  # there is nothing new
            return
        self.changes, rows = reply
        for name, text in zip(rows[::2], rows[1::2]):
            when, _, record = text.decode("utf-8", "replace").partition(" ")
            with suppress(ValueError):
                if float(when) > self.here.get(name.decode("utf-8", "replace"), (0,))[0]:
                    self.heard.append(record)


# Adds sums to a stream, of the last 100,000, for a week, and returns what is new there: ARGV are
# how many at most, after which entry, the box that tells, then number and text of each.
LUA_SUMS = """
for i = 4, #ARGV, 2 do
  redis.call('XADD', KEYS[1], 'MAXLEN', '~', 100000, '*', ARGV[3], ARGV[i] .. ' ' .. ARGV[i + 1])
end
redis.call('EXPIRE', KEYS[1], 604800)
local found = redis.call('XREAD', 'COUNT', ARGV[1], 'STREAMS', KEYS[1], ARGV[2])
return found and found[1][2] or {}
"""


class SharedSums:
    """Keeps the hourly sums of each box for all boxes: each tells the others what it adds to its
    own, and adds what they tell. A box that is away for longer than a week misses some; all miss
    what Redis loses before they have read it."""
    AT_ONCE = 200
    WAIT_SECONDS = 1
    SUM = re.compile(b"([0-9]{1,18}) (.*)", re.DOTALL)
    after: Optional[str] = None  # where the stream is read from

    def __init__(self, redis: Redis, prefix: str, ledger: Ledger):
        self.redis = redis
        self.key = prefix + "sums"
        self.box = short_digest(ledger.secret.hex())
        self.script = RedisScript(LUA_SUMS)
        redis.scripts.append(self.script)
        ledger.trade = self.trade

    def trade(self, database: Database) -> bool:
        """Returns whether there may be more. Runs in the ledger's thread."""
        if not self.redis.available:
            return False
        sums = database.untold(self.AT_ONCE)
        after = self.after or str(database.facts.get("heard", 0))
        asking = self.redis.call(*self.script.parts(
            [self.key], [self.AT_ONCE, after, self.box, *chain(*sums)]))
        asked = asyncio.run_coroutine_threadsafe(asking, self.redis.loop)
        try:
            entries = asked.result(self.WAIT_SECONDS)
        except (RedisFault, concurrent.futures.TimeoutError):
            return False  # they are told again, and the others know them by their numbers
        last = entries[-1][0] if entries else b"0-0"
        last_told = sums[-1][0] if sums else 0
        database.add_heard_sums(self.read(entries), int(last.partition(b"-")[0]), last_told)
        self.after = last.decode() if entries else after
        return self.AT_ONCE in (len(sums), len(entries))

    def read(self, entries):
        """Yields (box, number, text) of what others told."""
        for _, (box, text, *_) in entries:
            match = self.SUM.fullmatch(text)
            if match and box != self.box.encode():
                yield box.decode("latin-1"), int(match[1]), match[2]


def tell_first(redis: Redis, prefix: str, subject: Tuple[BucketKey, int], tell: Callable[[], bool]):
    """Calls `tell` in only one of the processes that see the same; in more while Redis is away."""
    redis.ask(lambda reply: reply is None or tell(),
              "SET", f"{prefix}told:{short_digest(subject)}", 1, "NX", "EX",
              Warnings.QUIET_SECONDS)


class SharedFeed(Feed):
    """The feed of all processes: each tells the others every second what was in it, and, while
    anybody looks, what happened."""
    FRESH_SECONDS = 2.5
    GONE_SECONDS = 60   # after which Redis forgets what nobody reads
    MOST_SECONDS = 200  # seconds of all processes that Redis keeps
    MOST_READ = 100     # of these, at once
    ADDED = "in_flight", "line", "running", "buckets"
    COUNTED = {"calls": int, "tokens": int, "failed": int, "usd": Decimal}
    TOLD = "begin", "end", "change", "warning"
    elsewhere = False   # whether pages are open there
    read_to: Optional[bytes] = None  # name of the last entry that was read

    def __init__(self, clock: Any, redis: Redis, prefix: str):
        super().__init__(clock)
        self.redis = redis
        self.key = prefix + "pulses"
        self.happened = deque(maxlen=self.ROOM)  # in this second
        self.others = {}       # the last second of each, after when that was read,
        self.more = Counter()  # and what was COUNTED in those that were read in this one

    def tell(self, name, payload):
        super().tell(name, payload)
        if self.elsewhere and name in self.TOLD:
            self.happened.append((name, payload))

    def exchange(self, payload: JsonObject):
        """Tells the others what was in this second, and asks what they told."""
        self.tell_fresh()
        oldest = self.clock.monotonic() - self.FRESH_SECONDS
        self.others = {name: one for name, one in self.others.items() if one[0] > oldest}
        self.note_interest()
        if not self.redis.available:
            self.read_to = None  # what is missed must not all be counted in one second
            return
        text = json.dumps({**payload, "looking": self.listeners > self.elsewhere,
                           "happened": list(self.happened)}, default=str)
        self.happened.clear()
        self.redis.ask(self.on_told, "XADD", self.key, "MAXLEN", "~", self.MOST_SECONDS, "*",
                       self.redis.process, text)
        self.redis.ask(None, "EXPIRE", self.key, self.GONE_SECONDS)
        if self.read_to:
            self.redis.ask(partial(self.on_entries, self.read_to), "XREAD", "COUNT",
                           self.MOST_READ, "STREAMS", self.key, self.read_to)

    def note_interest(self):
        """Makes calls tell of their beginning while pages are open in other processes."""
        elsewhere = any([one.get("looking") for _, one in self.others.values()])
        self.listeners += elsewhere - self.elsewhere
        self.elsewhere = elsewhere

    def on_told(self, name):
        if self.read_to is None and type(name) is bytes:
            self.read_to = name  # what was told before is not for us

    def on_entries(self, after, reply):
        if after != self.read_to:
            return  # an answer that came late: the one before has told of these
        with suppress(ValueError, TypeError, LookupError, ArithmeticError):
            (_, entries), = reply  # None where there are none
            for self.read_to, (process, text) in entries:
                if process.decode() == self.redis.process:
                    continue
                second = json.loads(text)
                self.more.update({field: number(second[field])
                                  for field, number in self.COUNTED.items()})
                self.others[process] = self.clock.monotonic(), second
                self.note_interest()
                for name, event in second["happened"]:
                    if name in self.TOLD and self.listeners > self.elsewhere:
                        super().tell(name, event)

    def pulse(self, payload):
        super().pulse(payload)
        self.more.clear()

    def added_up(self, payload: JsonObject) -> JsonObject:
        """Returns what was in a second of all."""
        total = dict(payload)
        with suppress(ValueError, TypeError, LookupError, ArithmeticError):
            for name in self.COUNTED.keys() & total.keys():
                value = total[name]
                total[name] = type(value)(self.COUNTED[name](value) + self.more[name])
            for _, other in self.others.values():
                self.add(total, other)
        return total

    def add(self, total, other):
        for name, value in total.items():
            more = other.get(name)
            if name in self.ADDED:
                total[name] = value + (more or type(value)())
            elif name.startswith("first_"):
                total[name] = max(value or 0, more or 0) or None
            elif name == "upstreams":
                total[name] = [busier(one, more or ()) for one in value]


def busier(upstream: JsonObject, others: Iterable[JsonObject]) -> JsonObject:
    """Returns how busy an upstream is, counting the calls of other processes."""
    same = [one for one in others if one["name"] == upstream["name"]]
    return {**upstream, **{name: upstream[name] + sum([one[name] for one in same])
                           for name in ("in_flight", "waiting")}}


class SharedStored(Stored):
    """Remembers in Redis, too, so that any process finds what another one has noted. A bill stays
    there until a call is told what it comes to, and charges that. Of two that are told the same at
    once, the one that does not find it there any longer gives back what it has charged, and
    writes down no usage."""
    KEEP_SECONDS = 30 * 86400
    MOST_NAMES = 200  # names that are looked for at once
    limits: Optional[Limits] = None  # its rules count for bills

    def __init__(self, policy: str, redis: Redis, prefix: str, clock: Any):
        super().__init__(policy)
        self.redis = redis
        self.prefix = prefix
        self.clock = clock

    def key(self, kind: str, name: str) -> str:
        return "%s%s:%s" % (self.prefix, kind, hashlib.sha256(name.encode()).hexdigest())

    def keep(self, key, value, *words):
        self.redis.ask(None, "SET", key, json.dumps(value), "EX", self.KEEP_SECONDS, *words)

    def note(self, thing, names):
        new = [name for name in names if name not in self.things]
        super().note(thing, names)
        for name in filter(self.things.__contains__, new):
            owner = Database.spell_owners([thing.owner])
            self.keep(self.key("thing", name), [owner, thing.upstream, thing.address], "NX")

    async def recall(self, call: Call):
        """Looks up the things that a call names and this process does not know, and the bill if the
        call asks for its answer."""
        self.redis.begin_call()  # each call comes here before it asks Redis for anything
        names, path = call.references(), call.stored
        if path and path.name:
            names += path.name, "%s/%s" % path[:2], self.bill_name(call) or path.name
        unknown = [name for name in names if name not in self.things][:self.MOST_NAMES]
        with suppress(RedisFault, ValueError, TypeError, LookupError):
            texts = unknown and await self.redis.call(
                "MGET", *[self.key("thing", name) for name in unknown])
            for name, text in zip(unknown, texts):
                if text:
                    maker, *place = json.loads(text)
                    self.put(name, Thing(Database.read_owners(maker)[0], *place))
            name = self.bill_name(call)
            text = name and await self.redis.call("GET", self.key("bill", name))
            if text:
                super().owe(name, self.read_bill(*json.loads(text)))
            else:
                self.bills.pop(name, None)

    # -- bills

    def owe(self, name, bill):
        is_new = name not in self.bills
        super().owe(name, bill)
        hold, call = bill.hold, bill.call
        ago = self.clock.monotonic() - hold.taken_at
        self.keep(self.key("bill", name), [
            [[key[0], Database.spell_owners(key[1:])] for _, key in hold.keyed_rules],
            hold.costs, wall_time(self.clock) - ago, call.dialect.name, call.models,
            list(call.made), bill.characters, call.endpoint], "NX" if is_new else "XX")

    def read_bill(self, keys, costs, taken, dialect, models, made, characters, endpoint):
        rules = {rule.text: rule for rule in self.limits.all_rules()}
        pairs = [(rules[text], (text, *Database.read_owners(owners)))
                 for text, owners in keys if text in rules]
        hold = Hold(self.limits.buckets, pairs, tuple(costs), None,
                    taken - wall_time(self.clock) + self.clock.monotonic())
        call = Call(DIALECTS[dialect], endpoint, "", "")
        call.upstream_model, call.models, call.made = models[0], models, made
        return Bill(hold, call, characters)

    def pay(self, name, entry):
        super().pay(name, entry)
        key = self.key("bill", name)
        hold = entry.hold
        entry.paid = self.redis.loop.create_future()

        def on_answer(reply):
            if isinstance(reply, RedisFault):
                self.redis.ask(None, "DEL", key)
            elif reply == 0:  # another process was told the same, and has paid
                if hold.keyed_rules:
                    hold.buckets.settle(hold.keyed_rules, NO_COST, hold.costs, hold.taken_at)
                hold.costs = NO_COST
                entry.usage, entry.picodollars, entry.priced = None, 0, None
            Stream.wake(entry.paid)
        self.redis.ask(on_answer, "DEL", key)


# --------------------------------------------------------------------------------------------------
# Reply: the way back to the caller of one request: a head, then a body as it comes from upstream,
# or an answer of ours. How a call is refused, limited or cut is decided here, and only here. It
# knows no upstreams' addresses and no buckets.
# --------------------------------------------------------------------------------------------------

# User agents with these words, in lower case, are where a person sits and reads.
PEOPLES_AGENTS = re.compile(
    "mozilla/|claude-cli/|codex[_-]|geminicli|opencode/|qwencode/|kimicli/|roo-?code|kilo-?code"
    "|cline/|zed/")
# These sleep for as long as Retry-After says, were it for hours.
SLEEPING_AGENTS = re.compile("codex[_-]")
PATIENT_SECONDS = 60  # clients need not retry after a longer wait
USER_FIELD_PREFIX = "x-openwebui-"  # fields that begin like this say who the caller's user is
OUR_FIELD_PREFIX = "x-llm-proxy-"   # fields that begin like this are meant for us
TIMEOUT_FIELD = OUR_FIELD_PREFIX + "timeout-ms"
RATE_FIELDS = """X-RateLimit-Limit X-RateLimit-Remaining X-RateLimit-Refill-Tokens
    X-RateLimit-Refill-Seconds X-RateLimit-Reset-Seconds""".split()  # in the order of Quota


@lru_cache(1000)
def rate_lines(limit, *refill):
    """Returns header lines with two gaps: for what is left, and for the time to the next refill."""
    return "".join([name + ": %s\r\n" for name in RATE_FIELDS]) % (limit, "%s", *refill, "%s")


ANY_ORIGIN = "Access-Control-Allow-Origin: *\r\nAccess-Control-Expose-Headers: *\r\n"
ONE_ORIGIN = "Access-Control-Allow-Origin: %s\r\nAccess-Control-Expose-Headers: *\r\n"
VARY = "Vary: Origin\r\n"
CRLF = "\r\n"
# Fields of a response that we write ourselves, then those that name the account, be it through
# LiteLLM, and those that speak for the origin that a browser asked, or to a server before us.
REPLACED = HOP_BY_HOP.union(map(str.lower, RATE_FIELDS), """
    content-length location content-location x-request-id x-upstream-request-start
    x-upstream-request-stop x-llm-input-tokens x-llm-output-tokens x-llm-cost-usd
    x-llm-estimated x-queue-ms x-ratelimit-warning

    set-cookie set-cookie2 openai-organization openai-project
    anthropic-organization-id llm_provider-openai-organization
    llm_provider-set-cookie x-litellm-model-api-base x-litellm-key-spend

    alt-svc strict-transport-security public-key-pins nel report-to
    reporting-endpoints clear-site-data x-accel-redirect x-accel-buffering
    x-sendfile""".split())
REPLACED_WITH_CORS = REPLACED.union("access-control-" + name for name in """
    allow-origin allow-headers allow-methods allow-credentials expose-headers
    max-age allow-private-network""".split())
VALIDATORS = set_of("etag content-md5 digest content-digest repr-digest")
EVENT_TYPES = tuple({dialect.events.content_type for dialect in DIALECTS.values()})
UNBUFFERED = "X-Accel-Buffering: no"  # nginx would hold events back
STREAM_LINES = ["Cache-Control: no-cache", UNBUFFERED]
REASONS = {status: phrase for status, (phrase, _) in
           http.server.BaseHTTPRequestHandler.responses.items()}


@lru_cache(4)
def format_date(second):
    """Returns a header line (RFC 9110 5.6.7)."""
    return "Date: " + email.utils.formatdate(second, usegmt=True)


class Common:
    """The parts that all replies share."""
    __slots__ = "config clock dialects budget turns origins id_begin id_ends".split()

    def __init__(self, config: Config, clock: Any, dialects: Dialects, budget: MemoryBudget,
                 turns: Turns, origins: Origins):
        self.config = config
        self.clock = clock
        self.dialects = dialects
        self.budget = budget
        self.turns = turns
        self.origins = origins
        self.begin_ids()

    def begin_ids(self):
        """Begins the ids of the next second, as a whole new id for each request would cost a
        microsecond. Their ends are counted: random ones cost the ledger three times the pages."""
        self.id_begin = new_request_id(self.clock)[:-12]
        self.id_ends = itertools.count(random.getrandbits(47))


IDENTITY, PACKED, UNREADABLE = range(3)
ENCODINGS = {  # of responses; of the first ones some servers do not know that they are none
    **dict.fromkeys(["", *"identity none utf-8 utf8 binary 8bit 7bit chunked".split()], IDENTITY),
    "gzip": PACKED, "x-gzip": PACKED, "deflate": PACKED}


def read_codings(text: str) -> int:
    """Returns how a body is encoded (RFC 9110 8.4): once at most, where it can be read."""
    names = text.lower().split(",")
    return min(sum([ENCODINGS.get(name.strip(), UNREADABLE) for name in names]), UNREADABLE)


class Reply:
    """`begun`: a head was sent; `early`: it was ours, and comments followed. `close_after`: the
    connection cannot carry another request; `reset`: its end must not look like the body's."""
    WHOLE_SECONDS = 10    # a metered JSON answer is awaited whole for so long
    MAX_WHOLE = 1 << 18   # and up to this size, so that its head can tell its cost
    WAITING = "waiting for the model"

    request: Optional[Request] = None
    content: Optional[bytes] = None         # the body of the request, if it came with its head
    adapter: Optional[BodyAdapter] = None   # carries the body of the response
    first = b""                             # the part of it that came with the head
    framing_line = ""                       # the header line for its framing
    body: Optional[RequestBody] = None      # the rest of the request's body
    call: Optional[Call] = None
    begun = early = close_after = until_close = reset = False
    patience = inf                          # seconds that the caller gives each wait
    end_at = inf                            # when the call is to be over, in the loop's time
    comment_timer = None
    comment_seconds = inf                   # silence of a stream before a comment
    started = 0                             # unix nanoseconds when the request's head had come

    def __init__(self, client: Stream, context: Context, common: Common, entry: Entry):
        self.client = client
        self.context = context
        self.common = common
        self.entry = entry

    def take(self, request: Request):
        """Takes the head of the request that is to be answered."""
        self.started = self.common.clock.time_ns()
        self.request = request
        self.close_after = request.close_after
        if "x-request-id" in request.lines:
            given = request.get("x-request-id")
            self.entry.request_id = given if REQUEST_ID.fullmatch(given) else None
        self.entry.method = request.method
        self.entry.path = request.path
        client = self.client
        if request.sized and request.length <= len(client.read_buffer):
            self.content = client.read_buffer[:request.length]
            client.read_buffer = client.read_buffer[request.length:]
        else:
            self.body = RequestBody(client, request, self.common.budget)
        if client.ended:
            client.on_end()
        elif not client.reading and len(client.read_buffer) < MAX_READ_AHEAD:
            client.resume_reading()

    async def read_body(self) -> bytes:
        """Returns the body of a metered call."""
        most = self.common.config.max_body_bytes
        if self.content is None:
            self.body.owner = owner = self.entry.caller.key
            began = self.context.loop.time()
            content = await self.body.read(most, self.context)
            self.entry.held_up += self.context.loop.time() - began
            if len(content) > LARGE_BODY:
                await asyncio.sleep(0)  # to join it took its time
                try:
                    await self.common.turns.take(owner, self.context)
                except TimeoutError:  # the caller's own deadline is over
                    raise Overloaded from None
            return content
        if len(self.content) > most:
            raise BodyTooLarge
        return self.content

    def body_is_taken(self) -> bool:
        """Returns whether the request's body was read whole, so that no rest of it can be taken for
        the next request."""
        return self.content is not None or bool(self.body and self.body.skip())

    # -- while nothing comes

    def set_deadlines(self):
        """Raises BadRequest."""
        seconds = self.common.config.max_call_seconds
        text = self.request.get(TIMEOUT_FIELD)
        now = self.context.loop.time()
        if text is not None:
            if not re.fullmatch("[0-9]{1,9}", text) or not int(text):
                raise BadRequest("X-LLM-Proxy-Timeout-Ms must be a whole number of milliseconds,"
                                 " at least 1")
            self.patience = int(text) / 1000
        if seconds:
            self.end_at = now + seconds
        self.context.until = min(self.end_at, now + self.patience)

    def start_comments(self):
        """Starts the comments of a stream that waits long for its response, if its client skips
        comments."""
        call, seconds = self.call, self.common.config.stream_comment_seconds
        if seconds and call.endpoint not in NO_LIMIT_REPLY and call.dialect.TAKES_COMMENTS:
            self.comment_seconds = seconds
            self.comment_timer = self.context.loop.call_later(seconds, self.on_comment_timer)

    def stop_comments(self):
        if self.comment_timer:
            self.comment_timer.cancel()
            self.comment_timer = None

    def on_comment_timer(self):
        try:
            if not self.client.write_buffer:
                self.send_comment()
            self.start_comments()
        except Exception as bug:  # the call's task logs it
            self.context.end(bug)

    def send_comment(self):
        """Tells the caller of a stream that its call is alive, after a head where there was
        none."""
        text, head = self.WAITING, b""
        ticket = self.entry.ticket
        if ticket:
            text = "waiting, %d ahead" % ticket.queue.position(ticket)
            self.entry.queued = ticket.waited()
        if not self.begun:
            self.early = True
            head = self.stream_head(self.call.dialect.events.content_type)
        self.client.write(head + self.framed(self.call.dialect.events.comment(text)))

    def stream_head(self, content_type: str) -> bytes:
        """Returns the head of a stream of ours."""
        if self.request.version == 0:
            self.close_after = self.until_close = True
        chunked = [] if self.until_close else ["Transfer-Encoding: chunked"]
        return self.own_head(200, ["Content-Type: " + content_type, *STREAM_LINES, *chunked])

    @asynccontextmanager
    async def streaming(self, content_type: str):
        """Streams an answer of ours while the block runs: yields a function that sends a piece and
        waits until it is taken. The block ends when the client leaves, as most streams do."""
        async def send(data: bytes):
            self.client.write(self.framed(data))
            await self.drain()

        if self.request.method == "HEAD":
            raise MethodNotAllowed
        self.client.write(self.stream_head(content_type))
        self.close_after = True
        try:
            yield send
        except CallerGone:  # nobody takes what is left
            self.reset = True
        if not (self.reset or self.until_close):
            self.client.write(LAST_CHUNK)

    def framed(self, event):
        """Returns an event as it goes into a stream whose head was ours."""
        self.entry.passed += len(event)
        return event if self.until_close else encode_chunk(event)

    def error_event(self, refusal):
        dialect = self.call.dialect
        body = refusal.body or dialect.error(refusal, refusal.status)
        return dialect.error_event(body, self.call.endpoint)

    # -- what comes from upstream

    def receive(self, response: Response) -> BodyAdapter:
        """Decides how a body is passed on, and takes what has come of it. Raises UpstreamFailed."""
        call, readers, editors = self.call, [], ()
        if self.comment_timer:
            self.stop_comments()
        self.context.until = self.end_at
        streamed, encoding, may_tell_usage = self.kind_of(response.head)
        response.streamed = streamed
        if call.on_made:
            readers.append(NameReader(
                call.dialect.events if streamed else None, call.on_made,
                streamed and call.endpoint == "messages"))  # tools make files at any time
        # A part of what is owed for settles nothing, though nobody asked for one.
        if may_tell_usage and not response.bodiless and (
                response.status < (201 if call.owes else 400)):
            self.entry.reader = UsageReader(
                call, streamed, encoding != UNREADABLE, encoding == PACKED)
            readers.append(self.entry.reader)
        if call.usage_requested_by_us or call.masks or response.status >= 400:
            editors = self.editors_of(response, streamed, encoding)
        self.adapter = adapter = self.adapt(
            response, streamed and encoding == IDENTITY, readers, editors)
        try:
            self.first = adapter.feed(response.stream.take_all())
        except Malformed as failure:
            raise UpstreamFailed(failure) from None
        return adapter

    def editors_of(self, response, streamed, encoding):
        """Returns what changes a body."""
        call, editors = self.call, []
        if call.usage_requested_by_us and streamed and encoding == IDENTITY and self.entry.reader:
            editors.append(Editor(call.dialect.events, HiddenUsage(call.dialect)))
        if call.masks:
            editors += self.unmasking(response, streamed, encoding)
        if response.secret and response.status >= 400 and not response.bodiless:
            editors += self.hiding_key(response, encoding)
        return editors

    def hiding_key(self, response, encoding):
        """Returns what passes an error on decompressed and without our key."""
        editor = Editor(None, HiddenKey(response.secret))
        if encoding == IDENTITY:
            return [editor]
        dialect = self.call.dialect
        instead = dialect.error(Refusal("The upstream's error cannot be read"), response.status)
        response.hides |= VALIDATORS
        if encoding == UNREADABLE:
            response.hides |= {"content-type"}  # that of what stands in its place is said below
        elif response.streamed:  # its head, which promises events, goes out first
            instead = dialect.error_event(instead, self.call.endpoint)
        return [ErrorUnpacker(encoding == PACKED, instead), editor]

    def kind_of(self, head):
        """Returns whether a response is a stream of events, how its body is encoded, and whether it
        may tell usage."""
        call = self.call
        key = call.dialect, call.endpoint, call.owes is None
        cached = head.cache.get(key)
        if cached is None:
            kind = head.get("content-type", "")
            streamed = call.dialect.is_stream(kind)
            # An answer to a call that we do not know may be anything, and sounds are not awaited.
            may_tell = call.endpoint != UNKNOWN or streamed or "json" in kind.lower()
            if call.unmetered or call.endpoint == UPLOAD:
                may_tell = call.owes is not None
            encoding = read_codings(head.get("content-encoding", ""))
            cached = head.cache[key] = streamed, encoding, may_tell
        return cached

    def unmasking(self, response, streamed, encoding):
        """Returns the editor that puts values back for a call's placeholders; none without any, or
        where the body cannot be read."""
        call, masks = self.call, self.call.masks
        redactor = masks.redactor if self.common.config.redact_answers == "on" else None
        kind = response.head.get("content-type", "text/").lower()
        is_read = streamed or "json" in kind
        has_text = is_read or kind.startswith("text/") and response.status < 400
        if not has_text or not (masks.values or redactor) or response.framing.ended:
            return []
        if not is_read or encoding != IDENTITY:
            masks.pass_opaque(UpstreamFailed("its answer cannot be read"))
            return []
        events = call.dialect.events if streamed else self.other_events(kind)
        return [Editor(events, Unmasking(call.dialect, events, Restorer(masks, redactor)))]

    def other_events(self, kind):
        """Returns how a stream is cut that is not of its API's type, None where it is none."""
        if not self.call.stream:
            return None
        return NDJSON if kind.startswith(LINES_OF_JSON) else JSON_ARRAY

    def adapt(self, response, has_events, readers, editors):
        """Chooses the framing for the client: chunked stays chunked, byte for byte, and sized stays
        sized, unless something is inserted or removed."""
        framing, events, style = response.framing, None, AS_IS
        drops = editors and not framing.ended
        if has_events and (self.early or self.comment_seconds < inf):
            events = self.call.dialect.events
        if type(framing) is Sized and not drops and not events:
            if response.length is not None and response.status != 204:
                self.framing_line = f"Content-Length: {response.length}\r\n"
        elif self.request.version == 0:  # HTTP/1.0 knows no chunks: closing ends the body
            style = PAYLOAD
            self.close_after = self.until_close = True
        else:
            if drops or not isinstance(framing, Chunked):
                style = CHUNKED
            self.framing_line = "Transfer-Encoding: chunked\r\n"
        adapter = BodyAdapter(framing, style, (*readers, *editors), events)
        adapter.secret = response.secret.encode()
        if self.early:
            adapter.passed = self.entry.passed  # comments
        return adapter

    async def receive_whole(self, response: Response):
        """Awaits a metered answer that is no stream, unless it is large or slow. Raises
        UpstreamFailed."""
        stream, adapter, loop = response.stream, self.adapter, self.context.loop
        if response.head.get("content-type", "").lower().startswith(LINES_OF_JSON):
            return  # a stream, though of another API
        seconds = min(self.WHOLE_SECONDS, response.address.transport.read_timeout, self.patience)
        deadline = loop.time() + seconds
        while not adapter.framing.ended and len(self.first) < self.MAX_WHOLE:
            began = loop.time()
            try:
                alive = await stream.more(
                    self.context, deadline - began, response.address.what_body)
                payload = adapter.feed(stream.take_all()) if alive else self.last_of(adapter)
            except TimeoutError:
                return
            except (Malformed, OSError) as failure:
                raise UpstreamFailed(failure) from None
            finally:
                self.entry.held_up += loop.time() - began
            self.first += payload

    @staticmethod
    def last_of(adapter):
        whole, rest = adapter.end_of_stream()
        if not whole:
            raise UpstreamFailed("closed in the middle of its answer")
        return rest

    async def require_stream(self, response: Response):
        """Raises NotAStream with what a response says that is none, for a caller whose stream has
        begun."""
        self.stop_comments()
        self.context.until = self.end_at
        streamed, encoding, _ = self.kind_of(response.head)
        if response.status == 200 and streamed and encoding == IDENTITY:
            return
        body = await response.read(self.context, 65536, self.patience)
        if response.status >= 400:
            body = flush_all(self.hiding_key(response, encoding), body)
        try:
            answer = parse_response(body)
        except ValueError:
            answer = None
        is_error = isinstance(answer, dict) and response.status >= 400
        raise NotAStream(cause="status %d" % response.status,
                         body=to_json_bytes(answer) if is_error else None)

    def begin(self, response: Response):
        """Sends the head of a response, together with what has come of its body."""
        clock, entry = self.common.clock, self.entry
        entry.first_byte = clock.monotonic()
        if self.early:
            return self.client.write(self.first)
        now = clock.time_ns()
        known = response.head.cache.get(response.hides)
        lines = (f"{known or self.response_lines(response)}{self.framing_line}"
                 f"X-Upstream-Request-Start: {self.started}\r\n"
                 f"X-Upstream-Request-Stop: {now}\r\n")
        if "date" not in response.head.lines:  # it is for us to say (RFC 9110 6.6.1)
            lines += format_date(now // 10 ** 9) + CRLF
        usage = entry.usage
        if usage and not self.call.stream:
            prompt, output = usage[:2]
            lines += (f"X-LLM-Input-Tokens: {prompt}\r\n"
                      f"X-LLM-Output-Tokens: {output}\r\n"
                      f"X-LLM-Cost-USD: {format_usd(entry.picodollars)}\r\n"
                      f"{'X-LLM-Estimated: true' + CRLF if usage.estimated else ''}")
        send = self.client.write if self.close_after else self.client.post
        send(self.head(response.status, lines) + self.first)

    def response_lines(self, response):
        """Returns the status line of a response, and the header lines that are passed on as they
        came, or nearly."""
        head, hides = response.head, response.hides
        replaced = REPLACED if self.common.origins.none else REPLACED_WITH_CORS
        lines = ["HTTP/1.1 %d %s" % (response.status, head.reason),
                 *head.end_to_end(replaced | hides)]
        if head.get("content-type", "").lower().startswith(EVENT_TYPES):
            lines.append(UNBUFFERED)
        redirects = [name for name in ("location", "content-location") if name in head]
        for name in redirects:
            prefix = "/" + self.call.prefix if self.call.prefix else ""
            where = response.address.location(head.get(name), prefix)
            lines.append("%s: %s" % (name.title(), where))
        if "x-request-id" in head:
            lines.append("X-Upstream-Request-ID: " + head.get("x-request-id"))
        if "content-type" in hides:
            lines.append("Content-Type: application/json")
        text = CRLF.join([*lines, ""])
        if response.secret:
            text = text.replace(response.secret, "*" * len(response.secret))
        if not redirects:  # redirects depend on the call
            head.cache[hides] = text
        return text

    async def carry(self, response: Response) -> str:
        """Pass the rest of a body on; returns how that ended, "ok" or "upstream_cut". Raises
        CallerGone where the client does not take it."""
        address, adapter = response.address, self.adapter
        seconds = min(address.transport.read_timeout, self.patience)
        transfer = Transfer(response.stream, self.client, adapter, seconds)
        if adapter.events:
            transfer.comment = adapter.events.comment(self.WAITING)
            transfer.comment_seconds = self.comment_seconds
        with transfer:
            try:
                ending = await self.context.wait(transfer.done, inf, address.what_body)
            except TimeoutError:  # the call's own deadline
                ending = Transfer.SILENT
        if ending == Transfer.SLOW:
            raise CallerGone
        self.entry.gave_up = ending == Transfer.SILENT and self.is_impatient()
        return "ok" if ending == Transfer.WHOLE else "upstream_cut"

    def is_impatient(self):
        """Returns whether the caller asked for a shorter wait than ours."""
        config = self.common.config
        return self.patience < (config.first_byte_timeout or config.read_timeout)

    def went_well(self, response: Response, ending: str) -> Optional[bool]:
        """Returns whether a call went well; None where the breaker has heard of it, or the upstream
        did not cause the end. An error in a response counts as its status would."""
        if response.status in FAILING or not self.adapter.framing.ended:
            return None
        reader = self.entry.reader
        if ending == "ok" or reader and not (reader.fault or reader.said_nothing):
            return True  # some servers never say that their streams ended
        return None if reader and reader.fault and reader.fault not in FAILING else False

    async def drain(self):
        """Waits until the client has taken all. Raises CallerGone, and what the call is ended
        with."""
        seconds = Transfer.SLOW_READER_SECONDS
        try:
            taken = await self.client.drain(self.context, seconds, "the client to take its answer")
        except TimeoutError:
            taken = False
        if not taken:
            raise CallerGone

    def missed_nothing(self) -> bool:
        """Returns whether a caller who left had all of a stream, up to its own end: what could not
        be sent holds no end of an event."""
        reader, client = self.entry.reader, self.client
        unsent = client.unsent + client.write_buffer
        return reader is not None and not EVENT_END.search(unsent) and reader.has_closed()

    def end(self, ending: str):
        """Notes how an answer ended that is not as it should be, and cuts one that is not whole."""
        self.entry.outcome = ending
        if not self.adapter.framing.ended:
            self.cut(UpstreamFailed("cut"))
        elif ending == "upstream_cut":
            self.entry.cause = "ended without its mark"

    def cut(self, why: Refusal):
        """Ends an answer that is not whole so that nobody takes it for whole: no last chunk, or too
        few bytes, or, where only closing ends the body, a reset. A stream whose head was ours is
        told `why`, where there is room for that, and ends properly: a broken one would hide it."""
        is_told = self.early and self.tell(why)
        self.reset = self.until_close and not is_told
        if why.close_after or not (is_told and self.body_is_taken()):
            self.close_after = True

    def tell(self, why):
        """Ends a stream with the error `why`; returns False if there is no room for it."""
        entry, event, adapter = self.entry, self.error_event(why), self.adapter
        if entry.first_byte is None:
            entry.first_byte = self.common.clock.monotonic()
        if adapter is None:
            framed = self.framed(event)
        else:
            framed = adapter.insert(event)
            entry.passed = adapter.passed
        if framed:
            self.client.write(framed + (b"" if self.until_close else LAST_CHUNK))
        return bool(framed)

    # -- what comes from us

    def send(self, status: int, body: bytes = b"", lines: Iterable[str] = (),
             content_type: str = "application/json"):
        """Sends a whole answer."""
        described = ["Content-Type: " + content_type, "Content-Length: %d" % len(body)]
        head = self.own_head(status, [*lines, *(described if status != 204 else ())])
        if self.request and self.request.method == "HEAD":
            body = b""
        self.entry.passed = len(body)
        self.client.write(head + body)

    def refuse(self, refusal: Refusal):
        """Answers a refusal: an assistant tells a limited caller, everybody else gets an error."""
        self.stop_comments()
        self.entry.outcome = refusal.outcome
        self.entry.cause = refusal.cause or refusal.code
        if self.begun:
            return self.cut(refusal)
        self.close_after = self.close_after or refusal.close_after
        if isinstance(refusal, LimitReached):
            self.entry.hold = Hold(tightest=refusal.tightest)
            return self.limit(refusal)
        dialect = self.call.dialect if self.call else self.common.dialects.guess(
            self.request and self.request.path, self.request)
        self.send(refusal.status, dialect.error(refusal, refusal.status),
                  self.lines_of(refusal.fields))

    @staticmethod
    def lines_of(fields):
        return ["%s: %s" % field for field in fields.items()]

    def limit(self, refusal):
        """Answers that a limit is reached: by an assistant, if LIMIT_REPLY wants one and one can
        speak, else by an error."""
        call, wait, fields = self.call, refusal.wait, dict(refusal.fields)
        dialect, now, reply = call.dialect, self.started // 10 ** 9, None
        if self.wants_assistant():
            reply = dialect.limit_reply(call, str(refusal), now)
        if reply is not None:
            content_type = dialect.limit_type(call)
            lines = STREAM_LINES if dialect.is_stream(content_type) else []
            return self.send(200, reply, self.lines_of(fields) + lines, content_type)
        body = dialect.error(refusal, refusal.status)
        if wait is None or wait > PATIENT_SECONDS:
            fields["x-should-retry"] = "false"  # SDKs would ask three times
            if SLEEPING_AGENTS.search(self.user_agent()):
                fields.pop("Retry-After", None)
                resets_at = None if wait is None else now + ceil(wait)
                body = dialect.final_error(refusal, refusal.status, resets_at)
        self.send(refusal.status, body, self.lines_of(fields))

    def wants_assistant(self):
        wanted = self.common.config.limit_reply
        return wanted == "assistant" or wanted == "auto" and bool(
            PEOPLES_AGENTS.search(self.user_agent())
            or any(name.startswith(USER_FIELD_PREFIX) for name in self.request.lines))

    def user_agent(self):
        return self.request.get("user-agent", "").lower()

    # -- both

    def head(self, status: int, lines: str) -> bytes:
        """Returns the head of an answer; `lines` are its status line and header lines, each with
        its line end. A header on every answer belongs here."""
        self.begun = True
        entry, hold = self.entry, self.entry.hold
        entry.status = status
        if entry.request_id is None:
            entry.request_id = f"{self.common.id_begin}{next(self.common.id_ends):012x}"
        if self.content is None and not self.body_is_taken():
            self.close_after = self.client.discarding = True
        rate = ""
        if hold and hold.tightest:
            limit, left, *refill, reset = hold.tightest.quota
            rate = rate_lines(limit, *refill) % (left, reset)
        cache = self.request.cache if self.request else {}
        cors = cache.get("cors")
        if cors is None:
            cors = cache["cors"] = self.cors_lines()
        lines += f"X-Request-ID: {entry.request_id}\r\n{rate}{cors}"
        if rate and self.common.config.warn_at:
            lines += self.warning_line(hold)
        if entry.queued is not None:
            lines += f"X-Queue-Ms: {entry.queued}\r\n"
        if self.close_after:
            lines += "Connection: close\r\n"
        return (lines + CRLF).encode("latin-1")

    def warning_line(self, hold):
        text = warning_text([(share, level.rule.text) for share, level in shares_used(hold)],
                            self.common.config.warn_at)
        return f"X-RateLimit-Warning: {text}\r\n" if text else ""

    def own_head(self, status, lines):
        """Returns the head of an answer of ours."""
        begin = "HTTP/1.1 %d %s" % (status, REASONS.get(status, "Error"))
        date = format_date(self.common.clock.time_ns() // 10 ** 9)
        return self.head(status, CRLF.join([begin, date, *lines, ""]))

    def cors_lines(self) -> str:
        origins = self.common.origins
        if origins.any:
            return ANY_ORIGIN
        if origins.none:
            return ""
        if self.request is None or "origin" not in self.request.lines:
            return VARY
        origin = self.request.get("origin")
        return (ONE_ORIGIN % origin if origins.allows(origin) else "") + VARY


# --------------------------------------------------------------------------------------------------
# Proxy: `serve` is the life of one call; `build` is the parts list, the only place where
# constructors meet. They do not know http.server.
# --------------------------------------------------------------------------------------------------

# Statuses by which an upstream says that the request is wrong: it costs its caller a request.
CALLERS_FAULTS = 400, 404, 413, 422


class Proxy:
    tally: Optional[Tally] = None  # of all workers, where there are several
    STEP_SECONDS = 0.005  # for so long one step of longer work may hold the loop
    PAID_SECONDS = 0.1    # for so long Redis may take to say whether a bill was paid

    def __init__(self, config: Config, clock: Any, loop: Loop,
                 callers: Callers, limits: Limits, prices: Prices, estimator: CostEstimator,
                 dialects: Dialects, stored: Stored, routes: Routes, books: Books,
                 watchers: Watchers):
        self.config = config
        self.clock = clock
        self.loop = loop
        self.callers = callers
        self.limits = limits
        self.prices = prices
        self.estimator = estimator
        self.dialects = dialects
        self.stored = stored
        self.routes = routes
        self.books = books
        self.redaction: Optional[Redaction] = None
        self.watchers = watchers
        self.traces = watchers.traces
        books.watch([one for one in watchers if one])
        self.weights = config.key_weights or {}
        self.wrong_keys = WrongKeys(clock)
        # What acts every second where there is a Redis:
        self.sharers: List[SharedQueue] = []

    async def serve(self, request: Request, reply: Reply):
        """The life of one call, in five verbs. Every step may refuse by raising; what refuses
        before anything was sent leaves the call to the next upstream that it may go to."""
        entry = reply.entry
        self.identify(request, entry)                                               # identify
        call = self.new_call(request, reply)
        await self.dialects.read(call, request.method, request, reply.read_body)
        if call.large:  # others come in between reading it, looking for things and estimating it
            await asyncio.sleep(0)
        if self.stored.redis:
            await self.stored.recall(call)
        self.begin(call, reply)
        upstreams = self.route(call, entry.caller)                                  # route
        if call.large:
            await asyncio.sleep(0)
        path = call.path
        for upstream in upstreams:
            try:
                if self.redaction:
                    await self.redact(upstream, reply, call)
                await self.serve_by(upstream, reply, entry, call)
                if entry.paid:  # it may turn out that another process has
                    with suppress(TimeoutError):
                        await reply.context.wait(
                            entry.paid, self.PAID_SECONDS, "whether its bill was paid")
                return
            except Refusal as refusal:
                if not refusal.nothing_sent or upstream is upstreams[-1]:
                    raise
                call.path = path  # it may name a model

    async def serve_by(self, upstream, reply, entry, call):
        """The rest of its life, at one upstream. Both with-blocks undo what they hold."""
        entry.upstream = upstream.name
        if call.endpoint is not None:
            call.prepare_for(upstream.model or upstream.dialect.model_name(call.resolved_model),
                             upstream.rewrite, None if upstream.model else self.dialects.resolve)
        subject = reply.context.subject = call.upstream_model, entry.caller
        with await self.admit(upstream, entry, call) as entry.hold:                 # admit
            if call.large and not upstream.rewrite:
                call.forget()
            try:
                with await self.forward(upstream, reply, call) as response:         # forward
                    if response.status >= 400:
                        upstream.guard_key(response)
                    ending = await self.pass_on(response, reply, entry)
                    if ending != "ok" or response.address.breakers.troubled:
                        upstream.judge(
                            response.address, reply.went_well(response, ending), subject)
                if reply.client.write_buffer:
                    await reply.drain()
            except (CallerGone, Stopped, UpstreamTimeout) as reason:
                self.settle_unended(reply, entry, reason)
                raise
            if not entry.hold.ended:
                self.settle(entry, ending)                                          # settle
            if ending != "ok":
                reply.end(ending)

    async def redact(self, upstream, reply, call):
        """Masks in a call what must not reach an upstream. Raises MustNotLeave, CannotBeRead."""
        entry = reply.entry
        entry.upstream = upstream.name
        masks = call.masks = self.redaction.masks(upstream.name, entry.caller.stored_key)
        if masks is None:
            return
        entry.redactions = masks.counts
        if reply.request.length != 0 and call.is_opaque():
            masks.pass_opaque(CannotBeRead())
        if call.json_body:
            if call.forgotten:
                call.remember()
            call.masked = await self.in_steps(masks.mask_payload(call.payload, call.body))
            self.redaction.judge(call)

    async def in_steps(self, steps):
        """Runs a generator step by step, with other tasks between the steps; returns its result."""
        until = self.loop.time() + self.STEP_SECONDS
        while True:
            try:
                next(steps)
            except StopIteration as end:
                return end.value
            if self.loop.time() > until:
                await asyncio.sleep(0)
                until = self.loop.time() + self.STEP_SECONDS

    async def pass_on(self, response, reply, entry):
        """Pass a response on; returns how it ended: its body, and by what it says itself."""
        call, ending = entry.call, "ok"
        if response.status < 300 and call.makes_things():
            call.on_made = partial(self.note_made, entry, response.address.name)
        entry.held_up += self.loop.time() - reply.context.since
        if reply.early:
            await reply.require_stream(response)
        framing = reply.receive(response).framing
        if not framing.ended and entry.reader and not (call.stream or response.streamed):
            await reply.receive_whole(response)
        if framing.ended:
            response.release()  # before the caller knows, as it may call again at once
        if response.status >= 400:
            entry.hold.settle(self.fault_costs(response.status))
            entry.outcome = "upstream_status"
        elif framing.ended:
            ending = entry.reader.ending(whole=True) if entry.reader else "ok"
            self.settle(entry, ending)
        reply.begin(response)
        try:
            if not framing.ended:
                ending = await reply.carry(response)
                if entry.reader:
                    ending = entry.reader.ending(ending == "ok")
            return ending
        finally:
            entry.passed = reply.adapter.passed

    def find_thing(self, call, caller):
        """Returns the stored thing that the call names, None if it is not known."""
        thing = self.stored.find(call, caller.key)
        bill = self.stored.bills.get(self.stored.bill_name(call))
        if bill:
            call.owes, call.dialect = bill.call, bill.call.dialect
            call.upstream_model = bill.call.upstream_model
        return thing

    def note_made(self, entry, address, names):
        entry.call.made = names
        self.stored.note(Thing(entry.caller.key, entry.upstream, address), names)

    def require_price(self, call, entry):
        """Raises NoPrice for a model that may pass no rule in USD, where one counts."""
        names = [name for name in call.models if name]
        if not names and call.endpoint not in UNNAMED:
            names = [""]  # the upstream will take what it likes
        if all(map(self.prices.knows, names)):
            return
        rules = self.limits.matching(entry.caller, entry.address, call.upstream_model,
                                     entry.upstream, call.models[1:])
        if any([rule.unit == USD for rule, _ in rules]):
            raise NoPrice

    def identify(self, request: Request, entry: Entry):
        """Finds out who calls, once for each head that a connection repeats, until keys are
        changed."""
        cached = request.cache.get("caller")
        if cached is None or cached[0] is not self.callers or (
                cached[1].until is not None and cached[1].until <= self.wall()):
            cached = request.cache["caller"] = self.identify_anew(request, entry)
        _, entry.caller, entry.address, entry.agent = cached

    def identify_anew(self, request, entry):
        callers = self.callers
        entry.address = callers.address(request, entry.peer)  # also for refused requests
        entry.agent = user_agent(request)
        credential = callers.credential(request, request.query)
        try:
            caller = callers.identify(credential, entry.address, self.wall())
        except Unauthorized as refusal:
            answer = self.wrong_keys.refusal(entry.address) if credential else refusal
            answer.cause = refusal.cause
            raise answer from None
        caller = callers.end_user(request, entry.peer, caller)
        return callers, caller, entry.address, entry.agent

    def require_role(self, request: Request, entry: Entry, role: str):
        """Finds out who asks for a page that is for this role and those above it. Raises
        Unauthorized, TooManyGuesses, RoleTooLow."""
        self.identify(request, entry)
        has = entry.caller.role
        if has is None:  # anyone may call, and nobody else
            raise (self.wrong_keys.refusal(entry.address) if entry.caller.key[0] == "key"
                   else Unauthorized())
        if ROLES.index(has) < ROLES.index(role):
            raise RoleTooLow

    def wall(self) -> float:
        return wall_time(self.clock)

    @property
    def redis(self) -> Optional[Redis]:
        return self.limits.buckets.redis

    def check_models(self, call, method, globs):
        """Raises ModelNotAllowed for a call of another model than these, or of nobody knows
        which."""
        names = [name for name in call.models if name]
        if call.endpoint is None:  # such a call is not read
            if method not in FREE_METHODS and self.config.unknown_calls == "pass":
                raise ModelNotAllowed
            return
        if call.model in self.dialects.aliases and may_use(globs, call.model):
            names[:1] = [call.model]
        if not names or not all([may_use(globs, name) for name in names]):
            raise ModelNotAllowed

    def take_keys(self, keys: StoredKeys, orders: Sequence[Order]):
        """Goes by keys, and by what an admin has switched off, as they are now, and does what was
        ordered."""
        if keys.closed > self.callers.stored.closed and self.config.proxy_api_keys is None:
            self.books.log.say("a key is stored: nobody may call without one from now on")
        self.callers = Callers(self.config, self.callers.secret, keys)
        self.limits.take_keys(keys.rules, self.wall())
        self.routes.disable(keys.disabled)
        renew_estimator(self)
        renew_redaction(self)
        for order in orders:
            self.carry_out(order)
        self.watchers.feed.tell("change", {"what": "keys"})

    def known_as(self, label: str) -> Iterable[Caller]:
        """Returns the callers that have this label, or had it lately."""
        return {caller.key: caller for caller in [  # as it is now, not when it called
            *self.watchers.pulse.named(label), *self.callers.named(label)]}.values()

    def carry_out(self, order):
        """Carries an order out: fills a caller's buckets, or adds to them."""
        count = 0
        for caller in self.known_as(order.caller):
            if order.unit is None:
                self.limits.buckets.fill(caller.key)
                count += 1
            else:
                until = self.clock.monotonic() + order.until - self.wall()
                count += self.limits.give(
                    caller, order.unit, order.amount, until, bool(order.done))
        if not count:
            self.books.log.say("%s has no bucket in %s: it was given nothing" % (
                in_ascii(order.caller), order.unit))

    def admit(self, upstream, entry, call):
        """Sets aside what the call will cost; `least` of that is not learned. Raises LimitReached,
        NoPrice, ModelNotAllowed."""
        key = entry.caller.stored_key
        if key and key.globs:
            self.check_models(call, entry.method, key.globs)
        estimator = self.estimator
        costs = least = NO_COST if call.unmetered else estimator.one_request
        if estimator.needs_estimate and not call.unmetered:
            if estimator.needs_price:
                self.require_price(call, entry)
            costs, least = estimator.estimate(call, entry.caller.key)
        return self.limits.admit(entry.caller, entry.address, call.upstream_model, costs,
                                 upstream.name, least, call.models[1:])

    def new_call(self, request, reply):
        """Returns a call as its head tells of it, which is read once, too. Raises NotForCalls."""
        if reply.entry.caller.role in STEERING:
            raise NotForCalls
        if self.traces:
            reply.entry.trace = Trace.join(request)
        if self.config.max_call_seconds or TIMEOUT_FIELD in request.lines:
            reply.set_deadlines()
        place = request.cache.get("place")
        if place is None:
            place = self.dialects.place(request.method, request.path, request.query, request)
            request.cache["place"] = place
        return Call(*place)

    def begin(self, call, reply):
        """Notes that a call was parsed, and runs from now on."""
        entry = reply.entry
        reply.call = entry.call = call
        entry.context = reply.context
        call.trace = entry.trace
        self.books.running[entry] = None
        if self.watchers.feed.listeners:
            self.watchers.feed.begin(entry)
        if call.stream:
            reply.start_comments()

    def route(self, call, caller):
        """Returns the upstreams that a call may go to, in the order to try them. Raises NoRoute,
        UpstreamNotAllowed, and what speaking of things that are not one's own is refused by."""
        thing, key = None, caller.stored_key
        if self.stored.policy != "pass" or self.stored.things:
            thing = self.find_thing(call, caller)
        only = key and key.upstream
        if only:
            if call.prefix not in (None, only) or only not in self.routes.by_name:
                raise UpstreamNotAllowed
            call.prefix = only
        upstreams = self.routes.find(call, thing)
        if key:  # a credential of ours, which no upstream gets
            upstreams = [one for one in upstreams if one.key != PASSTHROUGH]
            if not upstreams:
                raise UpstreamNotAllowed
        return upstreams

    def forward(self, upstream, reply, call):
        """Sends a call, in its turn where the upstream is busy: what is not metered does not
        wait."""
        method, context = reply.request.method, reply.context
        if upstream.queue and not (call.unmetered or context.slot):
            return self.forward_in_turn(upstream, reply, call)
        head = partial(self.request_head, reply.request, call, upstream)
        send = upstream.send_patiently if upstream.retries else upstream.send_once
        if call.body is None:
            body = reply.body if reply.content is None else reply.content
            if body:  # nothing is uploaded twice
                send = upstream.send_once
            return send(method, head, body, context)
        if call.stream and self.estimator.needs_usage and (
                call.upstream_model not in upstream.without_options):
            return self.send_with_question(upstream, send, method, head, call, context)
        return send(method, head, call.upstream_body, context)

    async def forward_in_turn(self, upstream, reply, call):
        ticket = reply.context.slot = await self.stand_in_line(upstream, reply)
        try:
            response = await self.forward(upstream, reply, call)
        except BaseException:
            if not ticket.parting:
                ticket.leave()
            raise
        finally:
            reply.context.slot = None
        response.ticket = ticket
        return response

    async def stand_in_line(self, upstream, reply):
        """Raises QueueRefused, BreakerOpen, UpstreamTimeout, Stopped, CallerGone."""
        entry, context = reply.entry, reply.context
        refusal = upstream.breaker_open(context.subject)
        if refusal:
            raise refusal
        caller = entry.caller
        before = (entry.queued or 0) / 1000  # in the queue of another upstream
        weight = self.weights.get(caller.key_name, 1)
        ticket = entry.ticket = upstream.queue.enter(caller.key, weight, before)
        try:
            if not ticket.running:
                turn = context.loop.create_future()
                ticket.on_ready = partial(Stream.wake, turn)
                seconds = upstream.queue.limits.seconds - before
                await context.wait(turn, seconds, "its turn at %s" % upstream.name)
            if ticket.left:
                raise QueueRefused("queue full")
            if not ticket.running:
                raise Stopped  # the queue is closed
            return ticket
        except BaseException as failure:
            ticket.leave()
            entry.hold.give_back()  # nothing was sent: leaving the queue costs nothing
            if not isinstance(failure, TimeoutError):
                raise
            if context.expired():
                raise UpstreamTimeout(nothing_sent=True) from None
            raise QueueRefused("queue timeout") from None
        finally:
            entry.ticket = None
            entry.queued = ticket.waited()
            entry.held_up += entry.queued / 1000 - before

    async def send_with_question(self, upstream, send, method, head, call, context):
        """Sends a call whose stream must be asked for its usage; an upstream that refuses the
        question is not asked again."""
        unasked = call.upstream_body
        call.dialect.request_usage(call)
        response = await send(method, head, call.upstream_body, context)
        if not call.usage_requested_by_us or response.status not in (400, 422):
            return response
        with ExitStack() as stack:
            stack.push(response)
            if not await response.mentions(call.dialect.USAGE_OPTION, context):
                stack.pop_all()
                return response
        call.usage_requested_by_us = False
        response = await send(method, head, unasked, context)
        if response.status < 400 and len(upstream.without_options) < KNOWN_MODELS:
            upstream.without_options.add(call.upstream_model)  # else the question was not the fault
        return response

    def settle(self, entry, ending):
        """Charges what the call used, and records it. A second call does nothing."""
        call, hold, reader = entry.call, entry.hold, entry.reader
        self.note_reasons(entry)
        if call.owes:
            return self.settle_bill(entry, ending)
        if call.unmetered or hold.ended:
            return
        if reader and reader.said_nothing:
            return hold.settle(self.fault_costs(reader.fault))
        held = 0  # unless nobody knows how much it used
        if entry.gave_up or ending == CallerGone.outcome or reader and reader.lost:
            held = hold.output_tokens
        usage = self.estimator.usage(call, entry.caller.key, reader, ending == "ok", held)
        if (usage.estimated or reader.running) and self.may_run(entry, usage, ending):
            return self.await_usage(entry)
        entry.usage = usage.with_others()
        entry.picodollars, entry.priced = self.prices.cost(usage, call.upstream_model)
        estimate = hold.costs[-1]
        if ending not in ("ok", CallerGone.outcome):  # no more is charged than came
            estimate = min(estimate, usage.input + usage.output or 1)
        hold.settle(self.estimator.costs(entry.usage, entry.picodollars, estimate))

    def note_reasons(self, entry):
        """Notes for a trace why the model stopped, before what says so is dropped."""
        if self.traces and entry.reader and not entry.reasons:
            entry.reasons = entry.reader.finish_reasons()

    def settle_unended(self, reply, entry, reason):
        """Settles a call whose caller has left, or did not want to wait so long."""
        if reason.nothing_sent:
            return
        if isinstance(reason, UpstreamTimeout):
            if reply.is_impatient():
                self.settle(entry, CallerGone.outcome)
            return
        if reply.missed_nothing():
            reason.outcome = "ok"
        self.settle(entry, reason.outcome)

    def may_run(self, entry, usage, ending):
        """Returns whether a call in the background has not told that it ended."""
        reader = entry.reader
        return entry.call.runs_in_background() and (not reader or reader.running or (
            usage.estimated and not self.final_usage(entry, ending)[1]))

    def await_usage(self, entry):
        """Keeps the charge of a background call open until its usage is known."""
        call, hold = entry.call, entry.hold
        hold.settle(hold.costs)
        if call.made:
            seen = entry.reader.output_characters() if entry.reader else 0
            self.stored.owe(call.made[0], Bill(hold, call, seen))

    @staticmethod
    def final_usage(entry, ending):
        reader = entry.reader
        return reader.reported_usage(ending == "ok") if reader else (None, False)

    def settle_bill(self, entry, ending):
        """Charges a background call once, to its first caller: when its usage is reported, or when
        it has ended without."""
        name, reader = entry.call.owes.made[0], entry.reader
        bill = self.stored.bills.get(name)
        entry.call.owes = None
        if not (bill and reader):
            return
        usage, is_final = self.final_usage(entry, ending)
        if not is_final or reader.running:
            join = operator.add if GOES_ON.search(entry.call.query) else max
            bill = bill._replace(characters=join(bill.characters, reader.output_characters()))
            self.stored.owe(name, bill)
            if not reader.closed:
                return
            usage = bill.seen_usage(reader.model)
        # A batch has no text, and what it used is not less than was held.
        if not usage.estimated or bill.call.endpoint != UNKNOWN or reader.fault:
            self.charge_bill(entry, bill, usage)
        self.stored.pay(name, entry)

    def charge_bill(self, entry, bill, usage):
        reader, before = entry.reader, bill.hold.costs
        entry.usage = usage.with_others()
        # Where nobody knows who served, it was the dearest.
        amounts, are_priced = zip(*[self.prices.cost(usage, name) for name in bill.call.models])
        entry.picodollars, entry.priced = max(amounts), all(are_priced)
        costs = self.estimator.costs(entry.usage, entry.picodollars, before[-1])
        if reader.fault and usage.estimated and not bill.characters:
            costs = self.fault_costs(reader.fault)
        hold = bill.hold
        entry.hold = Hold(hold.buckets, hold.keyed_rules, taken_at=hold.taken_at)
        entry.hold.settle(tuple(map(int.__sub__, costs, before)))

    def fault_costs(self, status):
        """Returns what a failed call costs: a request if the caller was wrong."""
        return self.estimator.costs(Usage(), 0, 0) if status in CALLERS_FAULTS else NO_COST

    def request_head(self, request, call, upstream, address):
        """Returns what goes upstream before the body, but for the lines that frame it; all but the
        trace is kept for the next call with the same head."""
        cached = request.cache.get(address)
        is_json = call.json_body is not None
        if not cached or cached[0] != call.path or cached[1] != is_json or call.owes:
            head = self.new_head(request, call, upstream, address)
            cached = request.cache[address] = call.path, is_json, head
        return cached[2] + call.trace.line() if call.trace else cached[2]

    def new_head(self, request, call, upstream, address):
        known_to_us = call.endpoint not in (None, UNKNOWN, UPLOAD)
        path, dialect = upstream.dialect.place(call.path, call.dialect, known_to_us)
        lines = self.lines_to_pass(request, upstream, call)
        if dialect is upstream.dialect and "anthropic-version" not in request:
            lines += dialect.VERSION_LINES
        lines += self.lines_of_ours(call, upstream)
        key = upstream.key
        if key == PASSTHROUGH:
            key = self.callers.credential(request, request.query)
        return upstream.head(request.method, path, call.query, dialect, key, lines, address)

    @staticmethod
    def lines_of_ours(call, upstream):
        lines = []
        if call.json_body:
            lines.append("Content-Type: application/json")
        # What is metered must stay readable, and what may quote a key of ours.
        if not call.unmetered or call.body is not None or upstream.hidden or call.owes:
            lines.append("Accept-Encoding: identity")
        return lines

    def lines_to_pass(self, request, upstream, call):
        """Returns the lines of a caller's head that go upstream. Names with "_" never do: CGI-like
        upstreams take a_b for a-b."""
        own_key = upstream.key == PASSTHROUGH
        passed = self.config.pass_headers or ()
        dropped = [self.callers.caller_header, Dialect.MASK_FIELD]
        if self.traces:
            dropped += Trace.replaced(request)
        dropped += [line.partition(":")[0].lower() for line in self.lines_of_ours(call, upstream)]
        if call.body is not None:
            dropped.append("content-encoding")
        if call.owes:
            dropped.append("range")
        if not REQUEST_ID.fullmatch(request.get("x-request-id", "")):
            dropped.append("x-request-id")
        dropped += [name for name in request.lines if "_" in name or not (
            UPSTREAM_FIELDS.fullmatch(name)
            or (own_key and ACCOUNT_FIELDS.fullmatch(name))
            or any(fnmatch.fnmatchcase(name, glob) for glob in passed))]
        return request.end_to_end(NEVER_UPSTREAM.union(dropped))


def new_loop(clock, log):
    """Returns an event loop that reports what no task of ours has caught."""
    def report(_, context):
        failure = context.get("exception")
        lines = []
        if failure:
            lines = traceback.format_exception(type(failure), failure, failure.__traceback__)
        log.say("%s\n%s" % (context["message"], "".join(lines).rstrip()))

    loop = Loop()
    loop.time = clock.monotonic
    loop.set_exception_handler(report)
    return loop


def build(config: Config, stream: BinaryIO, clock: Any = time,
          database: Optional[Database] = None, worker: Optional[Worker] = None) -> Proxy:
    """Puts the parts together. `clock` has monotonic() and time_ns(), as the module `time` has;
    without a `database` that can be written everything is kept in memory. A `worker` is one of
    several processes."""
    log = Log(stream, config.log_format == "json", clock,
              "worker %d: " % (worker.number + 1) if worker else "")
    secret = worker.secret if worker else file_secret(database)
    keys = keys_to_go_by(config, database, secret, log.say)
    loop = new_loop(clock, log)
    buckets = build_buckets(config, clock, loop, database)
    limits = build_limits(config, buckets, keys.rules)
    prices = Prices(config.prices, config.unpriced)
    stored = build_stored(config, buckets, clock)
    proxy = Proxy(config, clock, loop, Callers(config, secret, keys), limits,
                  prices, CostEstimator(config, prices, limits.units()),
                  Dialects(config), stored,
                  build_routes(config, clock, log.say),
                  build_books(config, clock, log, loop, limits, stored, database, keys, secret,
                              worker),
                  build_watchers(config, clock, log, limits))
    renew_redaction(proxy)
    hear_of_others(proxy)
    go_on(proxy)
    return proxy


def build_stored(config, buckets, clock):
    if buckets.redis is None:
        return Stored(config.stored)
    return SharedStored(config.stored, buckets.redis, buckets.prefix, clock)


def hear_of_others(proxy):
    """Connects the proxy to news from the ledger and Redis: what others have changed, and whether
    Redis is there."""
    ledger, buckets = proxy.books.ledger, proxy.limits.buckets
    if ledger:
        ledger.on_news = partial(soon, proxy.loop, proxy.take_keys)
    if buckets.redis:
        buckets.on_change = partial(tell_of_redis, proxy)
        share(proxy, buckets)


def share(proxy, buckets):
    """Makes a proxy share by Redis what it has beside buckets."""
    config, redis, stored = proxy.config, buckets.redis, proxy.stored
    stored.limits = proxy.limits
    prefix, ledger = buckets.prefix, proxy.books.ledger
    proxy.watchers.warnings.once = partial(tell_first, redis, prefix)
    if ledger and not ledger.worker:
        SharedKeys(redis, prefix, ledger)
        SharedSums(redis, prefix, ledger)
    if config.share_slots == "on" or config.share_slots is None and config.workers > 1:
        for upstream in proxy.routes.all:
            queue = upstream.queue
            if queue:
                upstream.queue = SharedQueue(
                    queue.most, queue.limits, proxy.clock, redis,
                    f"{prefix}slots:{upstream.name}",
                    lambda most: max(1, most // buckets.processes))
                proxy.sharers.append(upstream.queue)


def file_secret(database: Optional[Database]) -> bytes:
    """Returns the secret of a database, or one that ends with this process."""
    with suppress(sqlite3.Error, ValueError):
        if database:
            return database.secret()
    return os.urandom(32)


def keys_to_go_by(config: Config, database: Optional[Database], secret: bytes,
                  say: Callable[[str], None]) -> StoredKeys:
    """Returns the stored keys, and notes in the settings that there are some."""
    keys = stored_keys(database, secret, say)
    keys.closed = keys.closed or config.keys_are_stored
    if keys.closed:
        config.choose_defaults(True)
    return keys


def stored_keys(database, secret, say):
    """Returns the stored keys; if they cannot be read, which the ledger reports, nobody is let
    in."""
    if database is None:
        return StoredKeys(secret)
    try:
        stored = read_keys(database.key_rows(), secret)
    except sqlite3.Error as failure:  # an old file may have none, and could not be widened
        return StoredKeys(secret, closed="no such table" not in str(failure))
    for fault in stored.faults:
        say(fault)
    return stored


def go_on(proxy):
    """Carries out earlier orders that still hold, before the first call."""
    proxy.routes.disable(proxy.callers.stored.disabled)
    ledger = proxy.books.ledger
    with suppress(sqlite3.Error, ValueError):
        for order in ledger.new_orders() if ledger and ledger.database else ():
            proxy.carry_out(order)


def rebuild(proxy: Proxy, config: Config) -> List[str]:
    """Applies new settings to a running proxy; returns the names of those that need a restart.
    Raises ConfigFaults."""
    rest = proxy.config.take(config)
    config = proxy.config
    proxy.weights = config.key_weights or {}
    proxy.callers = Callers(config, proxy.callers.secret, proxy.callers.stored)
    proxy.limits = build_limits(config, proxy.limits.buckets, proxy.limits.own)
    proxy.limits.take_over(proxy.wall())
    proxy.stored.limits = proxy.limits
    proxy.prices = Prices(config.prices, config.unpriced)
    renew_estimator(proxy)
    renew_redaction(proxy)
    return rest


def renew_estimator(proxy):
    """Makes the estimator count in the units of the rules, with what was learned before."""
    models = proxy.estimator.models
    proxy.estimator = CostEstimator(proxy.config, proxy.prices, proxy.limits.units())
    proxy.estimator.models = models


def renew_redaction(proxy):
    """Makes the redaction that the settings and the known keys ask for."""
    config, callers = proxy.config, proxy.callers
    proxy.redaction = None
    kinds = (config.redact or ()) if config.redact or config.redact_patterns else None
    if kinds is None and not any([key.redact for key in callers.stored.keys.values()]):
        return
    shapes = shapes_of_keys(
        config.own_keys(), lambda word: callers.known_by(digest(word)) is not None)
    # One may take 20 us a character.
    shapes += [Shape(name, "", pattern.compiled, re.Match.end, "", pattern.longest, 1 << 9)
               for name, pattern in (config.redact_patterns or {}).items()]
    make = lru_cache(1000)(lambda some: Redactor(
        some, shapes, config.redact_allow or (), config.redact_country or ()))
    proxy.redaction = Redaction(
        make, kinds, config.redacted_upstreams(), config.redact_mode, config.redact_opaque)
    proxy.dialects.reads_counts = True


def build_limits(config: Config, buckets: Buckets, own: Dict[bytes, Tuple[Rule, ...]]) -> Limits:
    message = config.limit_message.replace("{me}", "%s/me" % config.public_url)
    limits = Limits(config.all_rules, buckets, message)
    limits.own = own
    return limits


def build_books(config, clock, log, loop, limits, stored, database, keys, secret, worker):
    ledger = None
    if config.database != "off":
        ledger = Ledger(config, database, limits, stored, clock, log, keys, secret,
                        worker and worker.number)
    usage_log = UsageLog(config.usage_log) if config.usage_log else None
    return Books(log, ledger, usage_log, loop)


def build_watchers(config, clock, log, limits):
    def poster(make, name, url, **options):
        tls = None
        if url.startswith("https:"):  # always checked, by the system's certificates or the own ones
            tls = ssl.create_default_context()
            if config.upstream_ca_file:
                tls.load_verify_locations(config.upstream_ca_file)
        return make(name, url, tls, log, **options)

    traces = webhook = None
    if config.otel_exporter_otlp_endpoint:
        traces = poster(
            partial(Traces, config.otel_service_name), "traces",
            config.otel_exporter_otlp_endpoint.rstrip("/") + "/v1/traces",
            fields=config.otel_exporter_otlp_headers)
    if config.webhook_url:
        webhook = poster(Poster, "webhook", config.webhook_url)
    buckets = limits.buckets
    feed = SharedFeed(clock, buckets.redis, buckets.prefix) if buckets.redis else Feed(clock)
    warnings = Warnings(clock, log, feed, webhook)
    marks = Marks(config.warn_at, warnings) if config.warn_at else None
    metrics = Metrics()
    pulse = Pulse(clock, limits.buckets, feed, metrics)
    return Watchers(feed, pulse, metrics, warnings, traces, marks)


def build_tls(config):
    """Returns the context of connections that go out."""
    if config.upstream_tls_verify == "on":
        return ssl.create_default_context(cafile=config.upstream_ca_file)
    # Without authorities, of which OpenSSL would read the folder for each connection
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    tls.check_hostname = False
    tls.verify_mode = ssl.CERT_NONE
    return tls


def build_buckets(config, clock, loop, database):
    if config.redis_url is None:
        return Buckets(clock)
    processes = database.facts.get("processes") if database else None
    return RedisBuckets(clock, build_redis(config, loop), config.redis_prefix, config.redis_away,
                        max(processes or config.peers, config.workers))


def build_redis(config: Config, loop: Loop) -> Redis:
    url, tls = config.redis_url, None
    if url.scheme == "rediss":
        tls = ssl.create_default_context(cafile=config.redis_ca_file)
    return Redis(url, tls, loop, "%s-%d" % (config.redis_prefix, os.getpid()))


WHILE_AWAY = {"share": "this process goes by its share of the limits, one of %d",
              "open": "there are no limits, for none of %d processes",
              "closed": "calls are refused by all of %d processes"}


def tell_of_redis(proxy, change):
    """Logs that Redis is "there", "away", or there "again"."""
    buckets = proxy.limits.buckets
    count = buckets.processes
    line = {"there": "Redis is there, shared by %d processes" % count,
            "away": "Redis %s: %s" % (buckets.reason, WHILE_AWAY[buckets.policy] % count),
            "again": "Redis is there again: %d processes share the limits" % count}[change]
    proxy.books.log.say(line)
    if change != "there":
        proxy.watchers.warnings.tell(
            "limits_degraded" if change == "away" else "limits_shared", (), None, text=line)


def build_routes(config: Config, clock: Any, say: Callable[..., None]) -> Routes:
    tls = build_tls(config) if config.speaks_https() else None
    transport = TransportConfig(
        config.open_timeout, config.first_byte_timeout or config.read_timeout,
        config.read_timeout, tls, config.https_proxy, config.no_proxy or "")
    breaking = config.breaker_failures, config.breaker_seconds
    limits = QueueLimits(config.max_queue, config.max_queue_per_caller, config.queue_seconds)
    made = [Upstream(one, transport, config.upstream_retries, breaking, limits, clock, say)
            for one in config.all_upstreams]
    return Routes(made.pop(0) if config.base_api_url else None, made)


# --------------------------------------------------------------------------------------------------
# Pages: what a person, a browser or a monitor asks us and not the upstream. They charge nothing and
# name no address. A page is a coroutine that answers by its Reply.
# --------------------------------------------------------------------------------------------------

Page = Callable[[Request, Reply], Awaitable[None]]


async def ask_models(loop: Loop, upstream: Upstream,
                     seconds: float) -> List[Model]:
    """Returns the models that an upstream lists. Raises Refusal, and ValueError for an answer that
    is no list."""
    context = Context(loop)
    context.until = loop.time() + seconds
    with closing(context):
        return await upstream.models(context)


def with_cause(refusal: Union[Refusal, ValueError]) -> str:
    """Returns what is known of why an upstream has no list."""
    cause = getattr(refusal, "cause", None)
    return f"{refusal} ({cause})" if cause else str(refusal)


class Catalogue:
    """The models of upstreams. Upstreams are asked side by side, and each list is kept for a
    minute; one that does not answer in time is asked again soon, and its last list holds until
    then. Of a named upstream only models that need no prefix count."""
    ASK_SECONDS = 5
    KEEP_SECONDS = 60
    AGAIN_SECONDS = 5

    def __init__(self, routes: Routes, clock: Any):
        self.upstreams = [one for one in routes.all if one.globs or one is routes.base]
        self.clock = clock
        self.lists = {}   # upstream -> its models
        self.due = {}     # when it is to be asked again
        self.asking = {}  # upstream -> the task that asks it

    async def models(self, context: Context, upstreams: List[Upstream]) -> Dict[str, Model]:
        """Returns the models of these upstreams by name; the first of a name counts. Callers that
        come while an upstream is asked share the answer."""
        for upstream in upstreams:
            if self.clock.monotonic() >= self.due.get(upstream.name, -inf) and (
                    upstream.name not in self.asking):
                self.asking[upstream.name] = context.loop.create_task(
                    self.ask(context.loop, upstream), name="models")
        names = [upstream.name for upstream in upstreams]
        for asking in [self.asking[name] for name in names if name in self.asking]:
            answered = context.loop.create_future()
            asking.add_done_callback(lambda _, answered=answered: Stream.wake(answered))
            with suppress(TimeoutError):
                await context.wait(answered, self.ASK_SECONDS + 0.5, "the lists of models")
                asking.result()  # a bug of ours is raised here
        models = {}
        for model in chain.from_iterable(self.lists.get(name, ()) for name in names):
            models.setdefault(model.name, model)
        return models

    async def ask(self, loop, upstream):
        seconds, name = self.AGAIN_SECONDS, upstream.name
        try:
            self.lists[name] = await ask_models(loop, upstream, self.ASK_SECONDS)
            seconds = self.KEEP_SECONDS
        except (Refusal, ValueError):
            pass
        finally:
            del self.asking[name]
            self.due[name] = self.clock.monotonic() + seconds


class Pages:
    CORS_METHODS = "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"
    PAGES = table_of("""
        /health health
        /healthz alive
        /readyz ready
        /metrics metrics""")
    METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
    MANY_LINES = 500  # of metrics, after which the loop has its turn
    MODELS_PATHS = frozenset(path for dialect in DIALECTS.values() for path in dialect.LIST_PATHS)

    def __init__(self, proxy: Proxy):
        self.proxy = proxy
        self.catalogue = Catalogue(proxy.routes, proxy.clock)
        config = proxy.config
        # Without these the list is that of the only upstream, where it speaks the client's API.
        self.lists_models = config.base_model or config.upstreams or config.model_aliases

    def find(self, request: Request) -> Optional[Page]:
        """Returns the page that answers this request, None where it is the upstream's."""
        if request.method == "OPTIONS":
            return self.preflight
        if request.method not in ("GET", "HEAD"):
            return None
        if request.path in self.PAGES:
            return getattr(self, self.PAGES[request.path])
        name, path = self.proxy.dialects.split(request.path)
        if path in self.MODELS_PATHS:
            return partial(self.models, name)
        return None

    def dialect(self, request):
        return self.proxy.dialects.guess(request.path, request)

    async def preflight(self, request, reply):
        lines = []
        if not reply.common.origins.none:
            asked = request.get("access-control-request-headers", "Authorization, Content-Type")
            lines = ["Access-Control-Allow-Methods: " + self.CORS_METHODS,
                     "Access-Control-Allow-Headers: " + asked,
                     "Access-Control-Max-Age: 86400"]
        reply.send(204, b"", lines)

    async def health(self, request, reply):
        """Answers /health, open to all; without a valid credential the quota is that of the
        address."""
        proxy, entry = self.proxy, reply.entry
        try:
            proxy.identify(request, entry)
        except Refusal as refusal:
            with suppress(BadRequest):
                if proxy.callers.credential(request, request.query):  # it may be guessing
                    entry.outcome, entry.cause = refusal.outcome, refusal.code
            entry.caller = Caller(("address", entry.address), entry.address)
        health = {"ok": True, "version": VERSION, "model": proxy.config.base_model,
                  **self.usual_quota(entry),
                  "upstreams": {one.name: one.stats() for one in proxy.routes.all},
                  **proxy.limits.buckets.health()}
        ledger = proxy.books.ledger
        if ledger:
            health["ledger"] = {"queued": len(ledger.queue), "dropped": ledger.dropped}
        reply.send(200, json.dumps(health).encode())

    async def alive(self, request, reply):
        """Answers /healthz: open to all, and tells nothing else."""
        reply.send(200, b"ok\n", (), "text/plain")

    async def ready(self, request, reply):
        """Tells whether calls can go anywhere."""
        able = [one for one in self.proxy.routes.all if one.can_connect() and not one.disabled]
        reply.send(200 if able else 503, b"ready\n" if able else b"not ready\n", (), "text/plain")

    async def metrics(self, request, reply):
        proxy = self.proxy
        if proxy.config.metrics != "open":
            proxy.require_role(request, reply.entry, "viewer")
        lines = []
        own = proxy.watchers.own_families(proxy.routes, proxy.limits.buckets)
        counted = self.count()
        if proxy.tally:
            proxy.tally.write(counted)
            counted = await proxy.tally.families()
        for name, samples in {**counted, **own}.items():
            for line in metric_lines(name, samples):
                lines.append(line)
                if len(lines) % self.MANY_LINES == 0:
                    await asyncio.sleep(0)
        reply.send(200, "\n".join([*lines, ""]).encode(), (), self.METRICS_TYPE)

    def count(self) -> Families:
        """Returns the metrics of this process."""
        proxy = self.proxy
        return proxy.watchers.families(proxy.routes, proxy.books, proxy.limits.buckets)

    def usual_quota(self, entry):
        """Returns the quota for a small call."""
        proxy, limits = self.proxy, self.proxy.limits
        matching = limits.matching(entry.caller, entry.address, proxy.config.base_model)
        if not matching:
            return {}
        quota, wait = limits.buckets.peek(matching, proxy.estimator.request_cost)
        return {"quota": {
            "limit": quota.limit, "remaining": quota.remaining,
            "refill_tokens": quota.refill_tokens,
            "refill_interval_seconds": quota.refill_seconds, "wait_seconds": wait}}

    async def models(self, name, request, reply):
        """`name` is that of an upstream whose prefix the path has. It tells its list itself, but
        that a key sees what it may use alone."""
        proxy = self.proxy
        proxy.identify(request, reply.entry)
        key = reply.entry.caller.stored_key
        globs = key.globs if key else ()
        if not name:
            models = await self.all_models(request, reply, key)
        elif globs and key.upstream in (None, name):
            models = await self.catalogue.models(reply.context, [proxy.routes.by_name[name]])
        else:
            models = None
        if models is None:
            return await proxy.serve(request, reply)
        reply.send(200, self.dialect(request).models([
            model for model in models.values() if not globs or may_use(globs, model.name)]))

    async def all_models(self, request, reply, key):
        """Returns None where the list is that of the only upstream."""
        own = key and (key.globs or key.upstream)
        if not (own or self.lists_models) and self.dialect(request).OWN_LIST:
            return None
        upstreams = self.catalogue.upstreams
        if key and key.upstream:  # others may see it by its prefix alone
            upstreams = [one for one in self.proxy.routes.all if one.name == key.upstream]
        models = await self.catalogue.models(reply.context, upstreams)
        if not (own or models or self.lists_models):
            return None  # it may speak the client's API alone
        for alias, name in (self.proxy.config.model_aliases or {}).items():
            models.setdefault(alias, models.get(name, Model(alias))._replace(name=alias))
        return models


# --------------------------------------------------------------------------------------------------
# Admin: the API of whoever owns the box: who uses what, keys, upstreams, live events. Reads are for
# viewers, writes for admins, and every write leaves a row in the audit. What reads the database
# runs in a pool, not on the loop.
# --------------------------------------------------------------------------------------------------

class AdminPage(NamedTuple):
    """One row of the admin API."""
    method: str
    path: str  # below /admin/api; NAME stands for what varies
    handler: str
    does: str  # a sentence for people

    @property
    def role(self) -> str:
        """The role that it takes at least."""
        return "viewer" if self.method == "GET" else "admin"


ADMIN_PAGES = [AdminPage(*row.split(None, 3)) for row in """\
GET    /                       contents    this list, and who you are
GET    /summary                summary     today, the last minute, running calls, upstreams
GET    /events                 events      what happens, as server-sent events
GET    /calls                  calls       calls, the latest first: ?before= limit= and filters
GET    /calls/NAME             call        all that is known of one call, by its id
GET    /usage                  usage       who used what: ?by= step= from= to= zone= format=csv
GET    /callers                callers     who called lately, with their buckets
POST   /callers/NAME/give      give        gives more: {"amount": 2, "unit": "usd", "for": "1d"}
POST   /callers/NAME/reset     reset       fills the buckets of one caller
GET    /keys                   keys        stored keys, without their secrets
POST   /keys                   add_key     makes one, and tells its secret this once
GET    /keys/NAME              key         one of them
PATCH  /keys/NAME              set_key     changes fields of it
DELETE /keys/NAME              remove_key  removes it
POST   /keys/NAME/revoke       revoke_key  it is valid no more
POST   /keys/NAME/restore      restore_key and is again
POST   /keys/NAME/rotate       rotate_key  another secret: grace
POST   /keys/NAME/give         give        more for it, as for a caller
POST   /keys/NAME/reset        reset       fills its buckets
GET    /upstreams              upstreams   upstreams, how they are and how quick
POST   /upstreams/NAME/enable  enable      calls go there again
POST   /upstreams/NAME/disable disable     no more calls go there
POST   /upstreams/NAME/test    test        asks it for its models
GET    /limits                 limits      the rules, and how often each refused
GET    /audit                  audit       who changed what: ?before=
GET    /config                 config      the settings, without secrets""".splitlines()]


class AdminRequest(NamedTuple):
    """One request to the admin API; `name` is what stood in the path."""
    request: Request
    reply: Reply
    caller: Caller
    name: str
    query: Texts
    body: JsonObject


class HelperPool:
    """Helper threads for blocking work, with one bounded queue, so that nobody waits for long
    behind the work of others."""
    SECONDS = 30

    def __init__(self, threads: int, name: str, most: int = 20):
        self.most = most
        self.pool = concurrent.futures.ThreadPoolExecutor(threads, name)
        self.owners = Counter()  # owner -> its jobs that wait or run

    async def run(self, context: Context, owner: CallerKey, act: Callable[..., Any],
                  *arguments: Any) -> Any:
        """Returns what `act` does in a helper thread. A job whose owner has left before it began is
        dropped; one that has begun counts until it ends. Raises Overloaded, and what `act`
        raises."""
        if sum(self.owners.values()) >= self.most:
            raise Overloaded(wait=1)
        answered = context.loop.create_future()

        def end():
            self.owners -= Counter([owner])
            Stream.wake(answered)

        try:
            job = self.pool.submit(act, *arguments)
        except RuntimeError:  # can't start new thread
            raise Overloaded from None
        self.owners[owner] += 1
        job.add_done_callback(lambda _: soon(context.loop, end))
        try:
            await context.wait(answered, self.SECONDS, "the database")
            return job.result()
        except TimeoutError:
            raise Overloaded from None
        finally:
            job.cancel()


class Admin:
    """Answers the admin API. A handler returns what is sent as JSON; it may refuse by raising, also
    ValueError, whose message says what would be right."""
    ROOT = "/admin/api"
    MAX_BODY = 1 << 16
    MAX_SHOWN = 200
    MAX_KNOWN = 20          # models of an upstream
    BEAT_SECONDS = 0.5      # between two looks for events, which go out together
    READ_SECONDS = 2        # until the proxy goes by a change of keys

    def __init__(self, proxy: Proxy, catalogue: Catalogue):
        self.proxy = proxy
        self.lists = catalogue.lists
        self.clock = proxy.clock
        self.feed, self.pulse, *_ = proxy.watchers
        self.path = proxy.config.database
        self.reading = HelperPool(2, "pages")
        self.changing = HelperPool(1, "changes", 200)  # a program may make many keys at once
        self.own_use = HelperPool(1, "own use")  # open to strangers
        self.rows = [(re.compile(row.path.replace("NAME", "([^/]+)")), row) for row in ADMIN_PAGES]

    def page(self, request: Request) -> Optional[Page]:
        """Returns what answers a request, None where it is not for the admin API."""
        if request.path == "/v1/quota" and request.method in ("GET", "HEAD"):
            return self.quota
        is_ours = (request.path + "/").startswith(self.ROOT + "/")
        return self.answer if is_ours else None

    def find(self, method, path):
        """Returns the row of a request and what NAME is in it. Raises NoSuchPage and
        MethodNotAllowed."""
        refusal = NoSuchPage
        for shape, row in self.rows:
            match = shape.fullmatch(path or "/")
            if match and (row.method == method or (row.method, method) == ("GET", "HEAD")):
                return row, urllib.parse.unquote("".join(match.groups()))
            if match:
                refusal = MethodNotAllowed
        raise refusal()

    async def answer(self, request: Request, reply: Reply):
        """Answers any request to the admin API."""
        entry = reply.entry
        self.proxy.require_role(request, entry, "viewer")
        row, name = self.find(request.method, request.path[len(self.ROOT):])
        self.proxy.require_role(request, entry, row.role)
        body = await self.read_body(reply) if row.method in ("POST", "PATCH") else {}
        query = dict(urllib.parse.parse_qsl(request.query, keep_blank_values=False))
        ask = AdminRequest(request, reply, entry.caller, name, query, body)
        try:
            result = await getattr(self, row.handler)(ask)
        except NoSuchKey as fault:
            raise NoSuchPage(str(fault)) from None
        except ValueError as fault:
            raise BadRequest(str(fault)) from None
        if row.role == "admin":
            self.proxy.books.log.say(
                f"{entry.caller.label} of {entry.address} did {row.method}"
                f" {in_ascii(request.path)}")
        if result is not None:
            self.send_json(reply, result, 201 if row.handler == "add_key" else 200)

    @staticmethod
    def send_json(reply, payload, status=200):
        reply.send(status, to_json_bytes(payload),
                   ["Cache-Control: no-store", "X-Content-Type-Options: nosniff"])

    async def read_body(self, reply):
        """Returns the JSON object that was posted. Raises BadRequest."""
        content = await reply.read_body()
        if len(content) > self.MAX_BODY:
            raise BodyTooLarge
        return JsonBody(content).parse() if content.strip() else {}

    async def run(self, jobs, reply, act, *arguments):
        """Returns what `act` does, in a helper thread. Raises BooksAway, Overloaded."""
        if not self.proxy.books.ledger:
            raise BooksAway("Nothing is kept: DATABASE is off")
        try:
            return await jobs.run(reply.context, reply.entry.caller.key, act, *arguments)
        except (sqlite3.Error, DatabaseFault):
            raise BooksAway from None

    async def read_books(self, ask, act, *arguments, jobs=None):
        """Returns what a method of LedgerReader does, for who asks."""
        zone = read_time_zone(ask.query.get("zone", ""), ask.query.get("offset", ""))
        reader = LedgerReader(self.path, self.proxy.wall(), zone)
        return await self.run(jobs or self.reading, ask.reply, act, reader, *arguments)

    def work_on_keys(self, mode, actor, act, *arguments):
        """Returns what a method of KeyStore does. By SQLite alone: closing the file that was opened
        otherwise would drop all locks that this process has on it
        (https://www.sqlite.org/howtocorrupt.html, 2.2)."""
        with closing(connect(self.path, mode)) as connection:
            return act(KeyStore(connection, self.clock, actor), *arguments)

    async def read_keys(self, ask, act, *arguments):
        """Returns what one does that changes nothing."""
        return await self.run(
            self.reading, ask.reply, self.work_on_keys, "ro", None, act, *arguments)

    async def change_keys(self, ask, act, *arguments):
        """Changes stored keys by a method of KeyStore, in the name of the admin; one change after
        the other. Returns its result once the proxy goes by it."""
        actor = Actor(ask.caller.label, ask.caller.role, ask.reply.entry.address)
        result = await self.run(
            self.changing, ask.reply, self.work_on_keys, "rw", actor, act, *arguments)
        await self.until_read(ask.reply.context)
        return result.as_dict() if result else {}

    async def until_read(self, context):
        """Waits until the ledger has read the keys as they are now. If that is hindered, the change
        holds all the same."""
        are_read = context.loop.create_future()
        self.proxy.books.ledger.on_read.append(
            partial(soon, context.loop, Stream.wake, are_read))
        with suppress(TimeoutError):
            await context.wait(are_read, self.READ_SECONDS, "the ledger")

    def pools(self) -> List[concurrent.futures.Executor]:
        return [jobs.pool for jobs in (self.reading, self.changing, self.own_use)]

    # -- what happens now

    async def contents(self, ask):
        return {"version": VERSION, "you": self.you(ask), "endpoints": [
            {"method": row.method, "path": self.ROOT + row.path, "role": row.role,
             "does": row.does} for row in ADMIN_PAGES]}

    @staticmethod
    def you(ask):
        return {"name": ask.caller.label, "role": ask.caller.role}

    async def summary(self, ask):
        proxy, sums = self.proxy, {}
        with suppress(BooksAway):
            sums = await self.read_books(ask, LedgerReader.today)
        return {"you": self.you(ask), "version": VERSION, "now": proxy.wall(),
                "keys_are_asked_for": not proxy.callers.is_open,
                "has_calls": bool(sums or self.pulse.callers),
                "today": Sum.of(sums.values()).as_dict(), "pulses": list(self.pulse.seconds),
                "running": self.running(),
                "near": self.near(), **await self.upstreams(ask)}

    def near(self):
        """Returns the buckets that are nearly empty."""
        least, buckets = 1 - min(self.proxy.config.warn_at or (0.8,)), self.proxy.limits.buckets
        callers = self.pulse.callers
        near = []
        for seen in buckets.seen():
            rule, key = seen.rule, seen.key
            owners = [callers[owner][0] for owner in key[1:] if owner in callers]
            if owners and rule.unit != RUNNING and seen.level <= least * rule.capacity:
                share = buckets.level_of(rule, key).level / rule.capacity
                near.append((share, owners[0].label, rule, key))
        nearest = heapq.nsmallest(20, near, key=operator.itemgetter(0))
        return [{"caller": label, **self.pulse.bucket(rule, key)}
                for share, label, rule, key in nearest if share <= least]

    def running(self):
        """Returns the calls that run, the latest last."""
        running = self.proxy.books.running
        first = max(0, len(running) - self.MAX_SHOWN)
        return [entry.as_running(self.clock) for entry in islice(running, first, None)]

    async def events(self, ask):
        """Streams events until either side ends."""
        reply, feed = ask.reply, self.feed
        text = ask.request.get("last-event-id", "")
        number = int(text) if re.fullmatch("[0-9]{1,18}", text) else feed.number
        feed.listeners += 1
        try:
            async with reply.streaming("text/event-stream") as send:
                await send(b": hello\n\n")
                while not feed.closed:
                    self.proxy.require_role(ask.request, reply.entry, "viewer")  # still
                    data, number = feed.since(number), feed.number
                    if data:
                        await send(data)
                    await reply.context.sleep(self.BEAT_SECONDS, "events")
        finally:
            feed.listeners -= 1

    def beat(self):
        """Tells open pages what was in the second that is over."""
        proxy = self.proxy
        upstreams = list(map(self.upstream_now, proxy.routes.all))
        waiting = sum(one["waiting"] for one in upstreams)
        second = self.pulse.tick(len(proxy.books.running), waiting)
        details = {}
        if self.feed.listeners:
            details = {"buckets": self.pulse.changed_buckets(),
                       "running": self.running(),
                       "upstreams": upstreams}
        self.feed.exchange({**second, **details})
        self.pulse.seconds[-1] = second = self.feed.added_up(second)
        self.feed.pulse({**second, **self.feed.added_up(details)})

    @staticmethod
    def upstream_now(upstream):
        stats = upstream.stats()
        queue = stats.pop("queue", {"waiting": 0, "longest_ms": 0})
        return {"name": upstream.name, **stats, **queue}

    # -- upstreams

    def describe(self, upstream):
        models = self.lists.get(upstream.name, [])  # as it told them before
        return {**self.upstream_now(upstream), **self.pulse.first_bytes(upstream.name),
                "models": list(upstream.globs), "model": upstream.model,
                "known": [clean(model.name) for model in models[:self.MAX_KNOWN]],
                "max_concurrency": upstream.queue.slots() if upstream.queue else 0}

    async def upstreams(self, _):
        return {"upstreams": list(map(self.describe, self.proxy.routes.all))}

    def upstream(self, name):
        upstream = self.proxy.routes.by_name.get(name)
        if not upstream:
            raise NoSuchPage("There is no upstream of this name")
        return upstream

    async def switch(self, ask, on):
        """Enables or disables an upstream; with a DATABASE it stays so after a restart."""
        upstream = self.upstream(ask.name)
        if self.proxy.books.ledger:
            await self.change_keys(ask, KeyStore.switch_upstream, ask.name, on)
        self.proxy.routes.switch(ask.name, on)
        self.feed.tell("change", {"what": "upstreams"})
        return self.describe(upstream)

    enable = partialmethod(switch, on=True)
    disable = partialmethod(switch, on=False)

    async def test(self, ask):
        upstream = copy.copy(self.upstream(ask.name))
        upstream.model = None  # its own list is asked for
        began, models, fault = self.clock.monotonic(), [], None
        try:
            models = await ask_models(self.proxy.loop, upstream, 10)
        except (Refusal, ValueError) as refusal:
            fault = with_cause(refusal)
        return {"ok": not fault, "fault": fault,
                "models": [clean(model.name) for model in models[:self.MAX_SHOWN]],
                "ms": round((self.clock.monotonic() - began) * 1000)}

    # -- keys

    async def keys(self, ask):
        return {"keys": [key.as_dict() for key in await self.read_keys(ask, KeyStore.list)]}

    async def key(self, ask):
        return (await self.read_keys(ask, KeyStore.find, ask.name)).as_dict()

    async def add_key(self, ask):
        name = ask.body.pop("name", None)
        return await self.change_keys(ask, partial(KeyStore.add, **ask.body), name)

    async def set_key(self, ask):
        reset = ask.body.pop("reset", None) is True
        return await self.change_keys(
            ask, partial(KeyStore.set, reset=reset, **ask.body), ask.name)

    async def change_key(self, act, ask):
        return await self.change_keys(ask, act, ask.name)

    remove_key = partialmethod(change_key, KeyStore.remove)
    revoke_key = partialmethod(change_key, KeyStore.revoke)
    restore_key = partialmethod(change_key, KeyStore.restore)

    async def rotate_key(self, ask):
        return await self.change_keys(ask, KeyStore.rotate, ask.name, ask.body.get("grace"))

    def known_as(self, label):
        """Returns the callers of this name. Raises NoSuchPage if there are none, as it may be
        misspelt."""
        callers = self.proxy.known_as(label)
        if not callers:
            raise NoSuchPage("Nobody of this name is known here")
        return callers

    async def give(self, ask):
        callers = self.known_as(ask.name)
        amount, unit, seconds = map(ask.body.get, ("amount", "unit", "for"))
        if unit in UNITS:
            require_bucket(self.proxy.limits, callers, unit)
        if type(amount) in (int, float):
            amount = "%.12g" % amount
        return await self.change_keys(ask, KeyStore.give, ask.name, amount, unit, seconds)

    async def reset(self, ask):
        self.known_as(ask.name)
        return await self.change_keys(ask, KeyStore.reset, ask.name)

    async def audit(self, ask):
        rows = await self.read_books(
            ask, LedgerReader.audit, self.number(ask, "before"), self.MAX_SHOWN)
        return {"rows": rows, "next": rows[-1]["id"] if len(rows) == self.MAX_SHOWN else None}

    # -- the books

    @staticmethod
    def number(ask, name, default=None):
        """Returns a whole number of the query. Raises BadRequest."""
        text = ask.query.get(name)
        if text is None:
            return default
        if not re.fullmatch("[0-9]{1,15}", text):
            raise BadRequest(f"{name} must be a whole number")
        return int(text)

    async def calls(self, ask):
        limit = min(self.MAX_SHOWN, self.number(ask, "limit", 50) or 1)
        filters = {name: ask.query[name] for name in CALL_FILTERS if name in ask.query}
        return await self.read_books(
            ask, LedgerReader.calls, self.number(ask, "before"), limit, filters)

    async def call(self, ask):
        call = await self.read_books(ask, LedgerReader.call, ask.name)
        if not call:
            raise NoSuchPage("No call of this id is known")
        return call

    async def usage(self, ask):
        query, now = ask.query, int(self.proxy.wall())
        filters = {name: query[name] for name in SUM_KEYS if name in query}
        by, step = query.get("by", "caller"), query.get("step", "day")
        start, end = self.number(ask, "from", now - DAY), self.number(ask, "to", now)
        usage = await self.read_books(ask, LedgerReader.usage, by, step, start, end, filters)
        if query.get("format") == "csv":
            return self.send_csv(ask.reply, usage["groups"])
        budgets = map(self.budget, self.proxy.known_as(filters.get("caller")))
        return {**usage, "budget": next(filter(None, budgets), None)}

    @staticmethod
    def send_csv(reply, groups):
        names = ["name", *NO_SUM.as_dict()]
        text = csv_of(names, [one.values() for one in groups])
        reply.send(200, text.encode(), ['Content-Disposition: attachment; filename="usage.csv"',
                                        "Cache-Control: no-store"], "text/csv; charset=utf-8")

    def budget(self, caller):
        """Returns the longest of a caller's rules in USD."""
        rules = [rule for rule, _ in self.proxy.limits.matching(caller, "", None)
                 if rule.unit == USD and rule.capacity]
        rule = max(rules, key=lambda one: one.rate[1], default=None)
        return rule and {"usd": format_usd(rule.rate[0]), "seconds": rule.rate[1],
                         "rule": rule.text}

    # -- callers and limits

    def known_callers(self):
        """Returns the callers of late, and those whose keys have names."""
        callers = {key: caller for key, (caller, _) in self.pulse.callers.items()}
        for caller in self.proxy.callers.everybody():
            if caller.role == "caller":
                callers[caller.key] = caller  # as it is now, not when it called
        return list(callers.values())

    async def callers(self, ask):
        sums = hours = seen = {}
        with suppress(BooksAway):
            sums, hours, seen = await self.read_books(ask, LedgerReader.of_callers)
        not_full = self.proxy.limits.not_full()
        rows = []
        for caller in self.known_callers():
            label, key = caller.label, caller.stored_key
            rows.append({
                "name": label, "team": caller.team, "key": bool(key),
                "paused": bool(key and key.disabled), "buckets": self.buckets_of(caller, not_full),
                "today": sums.get(label, NO_SUM).as_dict(), "hours": hours.get(label, [0] * 24),
                "last": self.pulse.callers.get(caller.key, (None, 0))[1] / 1e9 or seen.get(label)})
        rows.sort(key=lambda row: -(row["last"] or 0))
        return {"callers": rows[:self.MAX_SHOWN]}

    async def quota(self, request, reply):
        """Answers a caller with what it has left and what it used."""
        entry = reply.entry
        self.proxy.identify(request, entry)
        caller = entry.caller
        if caller.key in self.own_use.owners:
            raise Overloaded(wait=1)
        query = dict(urllib.parse.parse_qsl(request.query))
        ask = AdminRequest(request, reply, caller, "", query, {})
        calls = days = []
        with suppress(BooksAway):
            calls, days = await self.read_books(
                ask, LedgerReader.of_one, caller.label, jobs=self.own_use)
        buckets = self.buckets_of(caller, self.proxy.limits.not_full())
        self.send_json(reply, {
            "caller": caller.label, "team": caller.team, "role": caller.role,
            "now": self.proxy.wall(),
            "buckets": buckets, "warning": self.warning_of(buckets),
            "today": days[-1] if days else NO_SUM.as_dict(), "calls": calls, "days": days})

    def warning_of(self, buckets):
        shares = [(1 - float(bucket["level"]) / float(bucket["capacity"]), bucket["rule"])
                  for bucket in buckets if bucket["unit"] not in UNITS_OF_CALLS]
        return warning_text(shares, self.proxy.config.warn_at or ())

    def buckets_of(self, caller, not_full):
        buckets = self.proxy.limits.buckets_of(caller, self.proxy.config.base_model, not_full)
        return [self.pulse.bucket(rule, key) for key, rule in buckets.items()]

    async def limits(self, _):
        limits, refused = self.proxy.limits, self.proxy.watchers.metrics.refused
        return {"rules": [
            {"text": rule.text, "unit": rule.word, "refused": refused.get(rule.text, 0),
             "capacity": None if rule.capacity is None else format_amount(rule, rule.capacity)}
            for rule in dict.fromkeys(limits.all_rules())]}

    # -- settings

    async def config(self, _):
        config = self.proxy.config
        rows = [{"name": name, "value": text, "default": find_setting(name).default}
                for name, text in config.texts_in_use()]
        return {"settings": rows, "warnings": config.warnings()}


# --------------------------------------------------------------------------------------------------
# Dashboard: the source of the page, which asks the admin API for all that it shows: markup, style,
# script. It holds no data and no key; what others said goes into it as text, never as markup. Its
# closing braces stand behind the last line of a block: indentation shows where that ends, as here.
# --------------------------------------------------------------------------------------------------

DASHBOARD = r"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>llm_proxy</title>
<link rel="icon" href="data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 9 9'>
<path d='M0 9V6h2v3zm3 0V3h2v6zm3 0V0h2v9z' fill='%231f6fb8'/></svg>">
<meta name="viewport" content="width=device-width, initial-scale=1"><style nonce="%NONCE%">
:root { color-scheme: light dark; scrollbar-gutter: stable;
  --page: light-dark(#ffffff, #151514);    --surface: light-dark(#f6f6f3, #1e1e1c);
  --text: light-dark(#1a1a18, #ebebe8);    --muted: light-dark(#5d5c57, #a5a49d);
  --lines: light-dark(#dddcd6, #35342f);   --accent: light-dark(#1f5fbf, #82aef0);
  --good: light-dark(#1d7a4c, #59c08c);    --warn: light-dark(#8f5b00, #e3b341);
  --bad: light-dark(#b3261e, #f2857d);     --s0: light-dark(#8b8a84, #77766f);
  --s1: light-dark(#1f6fb8, #5aa2e8);      --s2: light-dark(#d0700f, #d8832a);
  --s3: light-dark(#12906f, #a8e6cf);      --s4: light-dark(#4a2c86, #8a5cf0);
  --s5: light-dark(#6b5a12, #e9e3b0);      --edge: 1px solid var(--lines); }
* { box-sizing: border-box; } :is(.tools, p):empty { display: none; }
body { margin: 0; background: var(--page); color: var(--text); overflow-wrap: anywhere;
  font: 14px/20px system-ui, sans-serif; font-variant-numeric: tabular-nums; }
small, th, dt, text, button, .choices, .label, td::before { font-size: 12px; line-height: 16px; }
small, th, dt, nav a, .label, .choices a, td::before { color: var(--muted); font-weight: 400; }
header, .spark { border-bottom: var(--edge); } header { margin-bottom: 24px; }
.wide, main { max-width: 1248px; margin: 0 auto; padding: 0 24px; } main { padding-bottom: 64px; }
#bar, .tools, #states, nav, .choices { display: flex; align-items: center; flex-wrap: wrap; }
#bar { gap: 4px 20px; min-height: 48px; } #states { gap: 0 16px; flex: auto; }
.tools { gap: 8px 16px; margin-bottom: 16px; } .choices { gap: 0 12px; margin-right: 16px; }
nav { gap: 0 24px; flex-wrap: nowrap; overflow-x: auto; scrollbar-width: none; }
nav a, .choices a { padding: 8px 0; border-bottom: 2px solid transparent; }
a[aria-current=true] { color: var(--text); border-color: var(--accent); }
a { color: var(--accent); text-decoration: none; } a:hover { text-decoration: underline; }
h2 { font-size: 14px; line-height: 20px; margin: 24px 0 8px; } h2:first-child { margin-top: 0; }
p, pre { margin: 0 0 8px; max-width: 88ch; } label { display: block; margin-bottom: 12px; }
button { font-family: inherit; color: var(--text); background: var(--page); cursor: pointer;
  padding: 5px 9px; border: var(--edge); border-radius: 4px; white-space: nowrap; }
button:hover { border-color: var(--muted); } button.chip { border-radius: 14px; white-space: wrap; }
button.main { background: var(--accent); border-color: var(--accent); color: var(--page); }
#bar :is(button, select) { border: 0; background: none; padding: 6px 0; font-size: 12px; }
input, select { font: inherit; color: var(--text); background: var(--page); padding: 5px 8px;
  border: 1px solid var(--muted); border-radius: 4px; max-width: 100%; height: 32px; }
::placeholder { color: var(--muted); opacity: 1; } table + button { margin-top: 12px; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 1px; }
label :is(small, input, select) { display: block; width: 100%; margin-bottom: 4px; }
summary { margin-bottom: 12px; cursor: pointer; font-weight: 600; } dd { margin: 0; }
table { border-collapse: collapse; width: 100%; } .number, td.actions { text-align: right; }
th, td { padding: 6px 16px 6px 0; border-bottom: var(--edge); vertical-align: top;
  text-align: left; } :is(th, td):last-child { padding-right: 0; }
th, nav a, td.number, .line, td .mark, .value, #today, #who { white-space: nowrap; }
td:not(.number, .line) { min-width: 128px; } .total td { font-weight: 600; border: 0; }
tr[tabindex] { cursor: pointer; } .actions:has(.ask) > button { visibility: hidden; }
tr[tabindex]:hover, tr.open { background: var(--surface);
  box-shadow: -8px 0 var(--surface), 8px 0 var(--surface); }
.gone { opacity: 0; transition: .3s; } .actions button { margin-left: 4px; }
td.actions { padding: 3px 0; position: relative; min-width: min(256px, 20vw); }
.ask { position: absolute; top: 0; right: 0; width: max-content; max-width: 348px; padding: 2px 4px;
  z-index: 1; display: flex; flex-wrap: wrap; gap: 4px; justify-content: end; align-items: center; }
.swatch, .mark::before { display: inline-block; width: 8px; height: 8px; margin-right: 6px; }
.mark.good::before { background: var(--good); border-radius: 50%; }
.mark.warn::before { background: var(--warn); clip-path: polygon(50% 0, 100% 100%, 0 100%); }
.mark.bad::before { background: var(--bad); } .mark::before { content: ""; }
.mark.off::before { border: 1.5px solid var(--muted); border-radius: 50%; }
.figures, .columns { display: grid; grid-template-columns: repeat(6, 1fr); gap: 16px 24px; }
.figures { margin-bottom: 32px; } .figure .label { grid-column: 1 / -1; white-space: nowrap; }
.figure { display: grid; grid-template: 16px 28px 16px / 1fr auto; column-gap: 8px; }
.value { font-size: 20px; line-height: 28px; } svg { display: block; overflow: visible; }
.chart :is(.total, .ahead) { fill: none; stroke: var(--text); stroke-width: 1.5; }
.spark path { fill: none; stroke: var(--s1); stroke-width: 1.5; } .grid { stroke: var(--lines); }
.bucket { display: grid; grid-template-columns: 88px 1fr; gap: 0 12px; align-items: center;
  min-width: min(400px, 27vw); } .low .level { background: var(--warn); }
.track { height: 8px; border-radius: 2px; overflow: hidden; background: var(--lines); }
.level { height: 100%; background: var(--accent); transform-origin: left; transition: .9s linear; }
.columns { grid-template-columns: minmax(0, 1fr) 440px; gap: 32px; } .chart { position: relative; }
.columns.form { grid-template-columns: minmax(0, 1fr) 280px; } .chart text { fill: var(--muted); }
.chart svg { width: 100%; height: 300px; touch-action: pan-y; } .cursor { stroke: var(--muted); }
.chart .ahead { stroke-dasharray: 5 4; } .chart .budget { stroke: var(--bad); }
.chart text.said { fill: var(--text); paint-order: stroke; stroke: var(--page); stroke-width: 4px; }
.values, .notice, .ask { background: var(--surface); border-radius: 4px;
  box-shadow: 0 0 0 1px var(--lines), 0 4px 12px #0003; }
.values { position: absolute; top: 0; width: auto; font-size: 12px; pointer-events: none; }
.values td { padding: 2px 8px !important; border: 0; white-space: nowrap; }
.timing { display: flex; height: 16px; gap: 1px; margin: 4px 0 8px; max-width: 720px; }
.timing div { min-width: 2px; flex-basis: 0; } .login { max-width: 360px; margin: 15vh auto 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; align-items: baseline; }
pre { background: var(--surface); padding: 8px 12px; white-space: pre-wrap; border-radius: 4px;
  font: 13px/20px ui-monospace, monospace; } .notice { align-items: baseline; gap: 12px; }
.box { border: var(--edge); border-radius: 4px; padding: 16px; margin-bottom: 24px; }
#notices { position: fixed; right: 16px; bottom: 24px; width: min(400px, calc(100% - 32px)); }
.notice { display: flex; justify-content: space-between; padding: 8px 12px; margin-top: 8px; }
#lost:not(:empty) { position: fixed; inset: auto 0 0; margin: 0; padding: 2px; max-width: none;
  text-align: center; background: var(--warn); color: var(--page); }
.stale .live, .stale .live * { color: var(--muted); }
.stale .live :is(path, rect), .stale .level { opacity: .4; transition: none; }
@media (max-width: 1099px) { .figures { grid-template-columns: repeat(3, 1fr); }
  .columns, .columns.form { grid-template-columns: minmax(0, 1fr); } .side { order: -1; } }
@media (max-width: 959px) { .wide, main { padding-left: 16px; padding-right: 16px; }
  .figures { grid-template-columns: repeat(2, 1fr); gap: 16px; } #filter { width: 200px; }
  nav { gap: 0 6px; font-size: 13px; justify-content: space-between; } button { padding: 7px 10px; }
  #bar { padding-top: 8px; gap: 4px 10px; font-size: 12px; } #today { flex: auto; }
  #states, #who { order: 1; } #states { flex: 1 50%; } .ask { right: auto; justify-content: start; }
  .bucket { margin: 4px 0 8px; grid-template-columns: 1fr; }
  .cards thead, .cards td:empty { display: none; } .cards :is(tbody, td) { display: block; }
  .cards tr { border-bottom: var(--edge); padding: 8px 0; display: grid; gap: 2px 24px;
    grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); }
  .cards td { border: 0; padding: 0; text-align: right; min-width: 0; }
  .cards td:not(.number) { white-space: normal; } .cards td > svg { display: inline-block; }
  .cards td::before { content: attr(data-label); line-height: 20px; float: left; }
  .cards td.whole { grid-column: 1 / -1; text-align: left; }
  .cards td.whole::before { content: none; } .actions button { margin: 4px 4px 0 0; } }
@media (prefers-reduced-motion: reduce) { * { transition: none !important; } }
@media print { :root { color-scheme: light !important; }
  #notices, #lost, nav, button, .tools, .side { display: none !important; } }
</style><body><header id="head" hidden><div id="bar" class="wide"><strong>llm_proxy</strong>
    <div id="states" class="live"></div><span id="today" class="live"></span><span id="who"></span>
    <select id="theme" aria-label="Theme"><option value="light dark">auto<option>light<option>dark
    </select><button id="leave">Log out</button></div>
  <nav id="tabs" class="wide" aria-label="Views"></nav></header>
<main id="main"></main><div id="notices" role="status"></div><p id="lost" role="status"></p>
<script type="module" nonce="%NONCE%">
// Elements. Text goes in as text nodes only: nothing that a caller or an upstream said is markup.
const $ = id => document.getElementById(id), one = selector => document.querySelector(selector);
const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
const shown = children => children.flat(9).filter(child => child || child === 0);
function fill(element, attributes, children) {
  const isClass = typeof attributes === "string";
  for (const [name, value] of Object.entries(isClass ? {class: attributes} : attributes ?? {}))
    if (name === "style") element.style.cssText = value;
    else if (name.startsWith("on")) element[name] = value;
    else if (value != null && value !== false) element.setAttribute(name, value);
  element.append(...shown(children));
  return element; }
const input = (name, label, more) => h("input", {name, "aria-label": label, ...more});
const [p, h2, small, pre] = ["p", "h2", "small", "pre"].map(tag => (...all) => h(tag, null, all));
const mark = (kind, text) => h("span", "mark " + kind, text);
const swatch = number => h("span", {class: "swatch", style: `background: var(--s${number})`});
const link = (tab, query, text, more) => h("a", {href: hashOf(tab, query), ...more}, text);
const select = (name, options, chosen) => h("select", {name, "aria-label": title(name)},
  options.map(option => h("option", {selected: option === chosen}, option)));
const chip = (text, onclick) => button(text, onclick, {class: "chip"});
const button = (text, onclick, more) => h("button", {type: "button", onclick, ...more}, text);
const main = text => h("button", "main", text);
const copyButton = (title, text) => button(title, () => attempt("Copying", () =>
  navigator.clipboard.writeText(text), "Copied."));
const command = (text, ...more) => [pre(text), p(copyButton("Copy command", text), " ", more)];
const form = (act, more, ...children) => h("form", {...more, onsubmit: ({target}) =>
  act(Object.fromEntries(new FormData(target)))}, children);
// A button that asks once, in its own place: for what `contents` has fields for, or just again.
const asking = (id, text, contents, act, mine = view) => view.asked !== id ? opener(text, id)
  : form(async fields => await act(fields) && mine === view && ask(null), {class: "ask",
    "aria-label": id}, contents, answers(text));
const answers = text => h("span", "line", main(text), " ", button("Cancel", () => ask(null)));
const opener = (text, id) => button(text, () => ask(id), {"data-opens": id});
function ask(id) { // where it ends, the button that opened it has the focus again
  const before = view.asked ? `[data-opens="${CSS.escape(view.asked)}"]` : ".box button";
  view.asked = id;
  paint(true);
  const next = one(id ? ".ask :is(input, .main), .asked" : before);
  next?.focus();
  next?.select?.(); } // what is typed takes the place of what was proposed
// Columns: the head, what a cell shows of an item, or its name there, and classes. Rows have keys.
const shownOf = (item, cell, kind) => cell.call ? cell(item)
  : kind === "number" ? count(item[cell]) : item[cell] ?? "–";
const row = (columns, item, key, more) => h("tr", {"data-key": key, ...more}, columns.map(([head,
  ...cell]) => h("td", {class: cell[1], "data-label": head}, shownOf(item, ...cell))));
const table = (columns, rows) => h("table", "cards live", h("thead", null, h("tr", null,
  columns.map(([head, , kind]) => h("th", {class: kind}, head)))), h("tbody", null, rows));
const list = (columns, items, keyOf = ({name}) => name) =>
  table(columns, items.map(item => row(columns, item, keyOf(item))));
// Painting touches only what differs. With each pulse, what is pointed at stays where it is.
const HANDLERS = "click submit input keydown pointermove pointerleave blur".split(" ");
const STILL = "tbody:is(:hover, :has(:focus-visible))";
function paint(asked) {
  view.isAsked = asked === true;
  if (model && !isMe) paintBar();
  if (view.draw && !view.isLoading) patchChildren($("main"), shown([view.draw()])); }
function patch(old, fresh) {
  if (!fresh.attributes) return old.isEqualNode(fresh) || (old.data = fresh.data);
  const isSet = name => name !== "style" && name !== "open"; // who looks opens and closes
  for (const {name} of [...old.attributes])
    if (isSet(name) && !fresh.hasAttribute(name)) old.removeAttribute(name);
  for (const {name, value} of fresh.attributes)
    if (isSet(name) && old.getAttribute(name) !== value) old.setAttribute(name, value);
  if (old.style.cssText !== fresh.style.cssText) old.style.cssText = fresh.style.cssText;
  for (const name of HANDLERS) old["on" + name] = fresh["on" + name];
  patchChildren(old, [...fresh.childNodes]); }
function patchChildren(old, children) {
  const isStill = !view.isAsked && old.matches(STILL);
  const keyed = new Map([...old.children].map(child => [child.dataset.key, child]));
  let place = old.firstChild, used = new Set();
  for (const child of children) {
    while (place && (used.has(place) || place.className === "gone")) place = place.nextSibling;
    const isAlike = place?.nodeName === child.nodeName && !place.dataset?.key;
    const twin = child.dataset?.key ? keyed.get(child.dataset.key) : isAlike && place;
    if (twin) patch(twin, child);
    if (!isStill && twin !== place) old.insertBefore(twin || child, place);
    used.add(twin || child); }
  if (!isStill) [...old.childNodes].filter(child => !used.has(child)).forEach(drop); }
function drop(node) { // rows of lists fade
  if (!node.dataset?.key || view.isAsked) return node.remove();
  node.className = "gone";
  setTimeout(() => node.remove(), 300); }
// Numbers, money and times as people read them. Times are unix seconds, in the viewer's zone.
const HOUR = 3600, DAY = 24 * HOUR, zone = Intl.DateTimeFormat().resolvedOptions().timeZone;
const compact = new Intl.NumberFormat("en", {notation: "compact", maximumFractionDigits: 1});
const MONEY = [0, 1, 2, 3, 4].map(digits => new Intl.NumberFormat("en",
  {minimumFractionDigits: digits, maximumFractionDigits: digits}));
const count = number => number == null ? "–" : usd(Math.round(number), 0);
const short = number => number < 10000 ? count(number) : compact.format(number);
const plural = (number, word) => `${count(number)} ${word}${number === 1 ? "" : "s"}`;
const words = name => name.replaceAll("_", " ");
const title = text => text[0].toUpperCase() + text.slice(1);
const sumOf = values => values.reduce((sum, value) => sum + value, 0);
const tokensOf = sum => sum.tokens ?? (sum.input ?? 0) + (sum.output ?? 0);
const dates = (options, format = new Intl.DateTimeFormat("en-GB", options)) => time =>
  format.format(time * 1000); // once made, as that takes long
const clock = dates({timeStyle: "medium"}), hour = dates({timeStyle: "short"});
const day = dates({day: "numeric", month: "short"}), year = dates({dateStyle: "medium"});
const moment = time => (day(time) === day(now()) ? "" : day(time) + " ") + clock(time);
function seconds(number) {
  const units = [[DAY, "d"], [HOUR, "h"], [60, "min"]];
  const [size, unit] = units.find(([size]) => number >= 1.5 * size) ?? [1, "s"];
  const digits = number < 10 * size && size !== 60 ? 1 : 0;
  return `${(Math.max(0, number) / size).toFixed(digits).replace(".0", "")}\u00a0${unit}`; }
function usd(value, digits = Math.abs(value) < 1 && Number(value) ? 4 : 2) {
  if (value > 0 && value < 10 ** -digits) return "<" + (10 ** -digits).toFixed(digits);
  return MONEY[digits].format(value ?? 0).replace("-", "−"); }
const doubts = sum => ["unpriced", "estimated"].filter(word => sum[word]).map(word =>
  sum[word] === true ? word : `${count(sum[word])} ${word}`);
const below = text => text && [h("br"), small(text)];
const money = (sum, digits) => [usd(sum.usd, digits), doubts(sum).map(below)];
// What the page knows, and what it asks.
const [KEY, FAULT, THEME] = ["key", "fault", "color-scheme"].map(name => "llm_proxy." + name);
const isMe = location.pathname.endsWith("/me");
let made = null;  // a key that is to be shown, as long as nobody goes on
let model = null; // the summary, kept up to date by events
let view = {};    // the shown tab: `draw`, and what to do on `ended`, `bucket` and `changed`
let skew = 0;     // seconds by which the proxy's clock is ahead
const now = () => Date.now() / 1000 + skew, isAdmin = () => model.you.role === "admin";
const setClock = time => { skew = time - Date.now() / 1000; };
const timeZone = () => ({zone, offset: -new Date().getTimezoneOffset()});
const pathOf = (...parts) => parts.map(encodeURIComponent).join("/");
async function send(path, {take = response => response.json(), ...options} = {}) {
  const headers = {Authorization: "Bearer " + sessionStorage.getItem(KEY), ...options.headers};
  const response = await fetch(path, {cache: "no-store", ...options, headers}).catch(() => null);
  if (response?.ok) return take(response);
  if (response?.status === 401) leave("No such key, or not valid.");
  const told = await response?.json().catch(() => null);
  const text = response ? "status " + response.status : "the proxy does not answer; does it run?";
  throw Object.assign(new Error(told?.error?.message ?? text), {status: response?.status}); }
const queryOf = query => String(new URLSearchParams(Object.entries(query).filter(([, value]) =>
  value || value === 0))).replace(/^(?=.)/, "?");
const read = (path, query = {}) => send(`admin/api/${path}` + queryOf(query));
const write = (method, path, body = {}) => send("admin/api/" + path, {method,
  headers: {"Content-Type": "application/json"}, body: JSON.stringify(body)});
const post = (...path) => write("POST", pathOf(...path));
// Does what was asked for, and says how it went; returns nothing where it failed.
async function attempt(what, act, done) {
  try {
    const result = await act();
    if (done) notice(done);
    return result ?? {};
  } catch (fault) {
    notice(`${what} failed: ${fault.message}`, "bad", 30); }}
const order = (what, name, verb, done) =>
  attempt(title(verb), () => post(what, name, verb), name + done);
const load = act => attempt("Loading", act).then(paint);
function notice(text, kind = "good", lasts = 8) {
  const box = h("div", "notice", mark(kind, text), button("Close", () => box.remove()));
  $("notices").replaceChildren(...[...$("notices").children, box].slice(-3));
  setTimeout(() => box.remove(), lasts * 1000); }
// Events: one stream, read by fetch, because an EventSource sends no key.
let stream = null, lastId = "";
async function listen() {
  stream?.abort();
  const {signal} = stream = new AbortController();
  while (!signal.aborted) {
    await follow(signal).catch(() => {});
    showLost(!signal.aborted);
    await new Promise(resolve => setTimeout(resolve, 2000)); }}
async function follow(signal) {
  const headers = lastId ? {"Last-Event-ID": lastId} : {};
  const body = await send("admin/api/events", {headers, signal, take: ({body}) => body});
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (let events = [""]; ;) { // the last is not whole yet
    const timer = setTimeout(() => reader.cancel(), 10000); // a pulse comes each second
    const {done, value} = await reader.read().finally(() => clearTimeout(timer));
    if (done) return;
    events = (events.pop() + value).split("\n\n");
    events.slice(0, -1).forEach(takeEvent); }}
function takeEvent(text) {
  const {id, event, data} = Object.fromEntries(text.split("\n").map(line => line.split(/: ?(.*)/)));
  lastId = id ?? lastId;
  EVENTS[event]?.(JSON.parse(data));
  showLost(false); }
function showLost(isLost) {
  document.body.classList.toggle("stale", isLost);
  $("lost").textContent = isLost ? "reconnecting, as of " + clock(model.now) : ""; }
const EVENTS = {
  begin: call => model.running.push(call),
  end(call) {
    model.has_calls = true;
    view.ended?.(call);
    update(model.running, {key: call.key, upstream: call.upstream, call, ended: now()}, "key"); },
  pulse(pulse) {
    setClock(pulse.now);
    if (dateOf(pulse.now) !== dateOf(model.now)) anew(); // what was used today
    Object.assign(model, {now: pulse.now, pulses: [...model.pulses, pulse].slice(-60)});
    model.today.usd = Number(model.today.usd) + Number(pulse.usd);
    takeRunning(pulse.running);
    for (const upstream of pulse.upstreams) update(model.upstreams, upstream, "name");
    for (const bucket of pulse.buckets) {
      update(model.near.filter(({caller}) => caller === bucket.caller), bucket, "rule");
      view.bucket?.(bucket); }
    paint(); },
  warning({event, ...told}) {
    const about = [told.caller, told.key, told.upstream, told.rule].filter(Boolean);
    notice(`${words(event)}: ${about.join(", ")}`, "warn", 60);
    renew(); },
  change: () => anew(), lost: () => [anew(), view.lost?.()]};
function update(all, told, name) { // what is known of one, which is found by its name
  Object.assign(all?.find(one => one[name] === told[name]) ?? {}, told); }
function takeRunning(told) { // one that nobody tells of any more has ended
  const since = name => model.running.filter(call => now() - call[name] < 3);
  const all = [...since("started"), ...told, ...since("ended")].map(call => [call.key, call]);
  model.running = [...new Map(all).values()]; }
async function loadSummary() {
  model = await read("summary", timeZone());
  setClock(model.now); }
const renew = () => load(loadSummary);
const anew = () => [renew(), view.changed && load(view.changed)];
const STATES = {closed: ["good", "up"], half_open: ["warn", "trying again"], open: ["bad", "down"],
  disabled: ["off", "disabled"]};
const stateMark = ({state}, name = "") => mark(STATES[state][0], name + STATES[state][1]);
function paintBar() {
  const all = model.upstreams, ill = all.filter(({state}) => state !== "closed");
  const rest = {name: `${all.length - ill.length} upstreams`, state: "closed"};
  const told = all.length > 4 ? [rest, ...ill.slice(0, 3)] : all;
  patchChildren($("states"), told.map(upstream => stateMark(upstream, upstream.name + " ")));
  $("today").textContent = usd(model.today.usd, 2) + " USD today"; }
// Now: six figures with a minute behind them, the running calls, and who is near a limit.
const total = (pulses, name) => sumOf(pulses.map(pulse => pulse[name]));
const most = (pulses, name) => "at most " + Math.max(0, ...pulses.map(pulse => pulse[name]));
const last = (pulses, name) => count(pulses.at(-1)?.[name]);
const minute = (pulses, name) => short(total(pulses, name)) + " in a minute";
function rate(pulses, name) { // a second, of the last ten
  const mean = total(pulses.slice(-10), name) / Math.min(10, pulses.length || 1);
  return mean < 10 ? mean.toFixed(1) : short(mean); }
const failed = pulses => (100 * total(pulses, "failed") / (total(pulses, "calls") || 1)).toFixed(1);
const FIGURES = [["Calls per second", "calls", rate, minute],
  ["Tokens per second", "tokens", rate, minute], ["In flight", "in_flight", last, most],
  ["In line", "line", last, most],
  ["First byte, ms", "first_p50", last, pulses => "95% within " + last(pulses, "first_p95")],
  ["Errors", "failed", pulses => failed(pulses) + "%", minute]];
const figure = ([label, name, value, note]) => h("div", "figure live", h("div", "label", label),
  h("div", "value", value(model.pulses, name)), spark(model.pulses.map(pulse => pulse[name]), 60),
  h("div", "label", note(model.pulses, name)));
function spark(values, places) { // a line through the last of these; what is null is a gap
  const top = Math.max(...values, 1), first = places - values.length, width = 72 / (places - 1);
  const point = (value, at) => value == null ? "" : (values[at - 1] == null ? "M" : "L")
    + ((first + at) * width).toFixed(1) + " " + (26 - 24 * value / top).toFixed(1);
  return svg("svg", {class: "spark", width: 72, height: 28, "aria-hidden": true},
    svg("path", {d: values.map(point).join("")})); }
const WAITS = {"first byte": () => "waits for first byte",
  line: ({position}) => "in line, " + (position ? position + " ahead" : "next")};
const outcomeOf = ({outcome, status}) =>
  outcome === "upstream_status" ? "upstream said " + status : words(outcome);
const stateOf = call => call.ended ? "ended: " + outcomeOf(call.call)
  : WAITS[call.state]?.(call) ?? call.state;
const callerOf = call => [call.caller, call.team && small(" ", call.team)];
const age = call => Math.max(0, (call.ended ?? now()) - call.started).toFixed(1);
const RUNNING = [["Caller", callerOf], ["Model", "model"], ["Upstream", "upstream"],
  ["State", stateOf], ["Seconds", age, "number"],
  ["Tokens", call => count(call.call?.output ?? call.tokens), "number"]];
const opens = act => ({tabindex: 0, onclick: () => String(getSelection()) || act(),
  onkeydown: event => event.key === "Enter" && act()});
const runningRow = call => row(RUNNING, call, call.key, opens(() => go("calls", {id: call.id})));
const NEAR = [["Caller", ({caller}) => link("callers", {filter: caller}, caller), "whole"],
  ["Left", bucket => bucketBar(bucket), "whole"]];
function openNow(view) {
  view.draw = () => {
    const all = model.running.toSorted((a, b) => b.started - a.started);
    const gone = all.filter(call => call.ended), since = gone[4]?.started ?? 0;
    const calls = all.filter(call => !call.ended || call.started >= since);
    const known = all.length - gone.length, told = model.pulses.at(-1)?.in_flight ?? 0;
    const running = plural(told > 200 ? told : known, "running call"); // 200 are told of
    return [h("div", "figures", FIGURES.map(figure)), h2(running), calls.length || model.has_calls
      ? table(RUNNING, calls.slice(0, 50).map(runningRow)) : firstCall(),
      p(calls.length > 50 && "The latest 50 are shown."), model.near.length > 0
      && [h2("Near a limit"), list(NEAR, model.near, near => near.caller + near.rule)]]; }; }
const empty = (text, line) => h("div", null, p(text), command(line));
const firstCall = () => empty(model.has_calls ? "There was no call."
  : "No call has come yet. Make one:", curlLine("YOUR-KEY"));
// Buckets: what is in one now follows from what was in it at its last refill.
function bucketNow(bucket) {
  const [capacity, refill, told] = [bucket.capacity, bucket.refill, bucket.level].map(Number);
  const {interval} = bucket, age = Math.max(0, now() - bucket.refilled);
  const turns = interval && Math.floor(age / interval), next = (turns + 1) * interval - age;
  const level = Math.max(told, Math.min(capacity, told + turns * refill));
  const full = Math.ceil((capacity - told) / refill) * interval - age;
  return {level, capacity, refill, next, full}; }
function bucketText({unit, interval}, {level, capacity, refill, next, full}) {
  if (unit === "running") return `${capacity - level} running, room for ${count(level)} more`;
  const amount = number => unit === "usd" ? usd(number, capacity < 1 ? 4 : 2) : count(number);
  const state = level <= 0 ? "empty: " : level < .2 * capacity ? "low: " : "";
  const more = full > next && interval > 5 ? `, ${amount(refill)} more in ${seconds(next)}` : "";
  return `${state}${amount(level)} of ${amount(capacity)} ${unit === "usd" ? "USD" : unit}`
    + (level >= capacity ? ", full" : `${more}, full in ${seconds(full)}`); }
const isOwn = ({rule}) => /^(each|key|address)/.test(rule); // of one caller alone
const isOfAll = ({rule}) => rule.startsWith("all");
function bucketBar(bucket) {
  const found = bucketNow(bucket), share = Math.max(0, Math.min(1, found.level / found.capacity));
  const style = `transform: scaleX(${share.toFixed(4)})`, [whose] = bucket.rule.split(" ");
  return h("div", {class: "bucket live" + (share < .2 ? " low" : ""), title: bucket.rule},
    h("div", {class: "track", "aria-hidden": true}, h("div", {class: "level", style})),
    h("span", null, words(bucketText(bucket, found)), !isOwn(bucket) && small(" for ", whose))); }
// Callers: their buckets, what they used today, and what may be done about it.
const nameAndTeam = ({name, team}) => [link("calls", {caller: name}, name), small(" ", team ?? "")];
const CALLERS = [["Caller", nameAndTeam, "whole"],
  ["Buckets", ({buckets}) => buckets.length ? buckets.filter(one => !isOfAll(one)).map(bucketBar)
    : small("no limit"), "whole"],
  ["Tokens today", ({today}) => short(tokensOf(today)), "number"],
  ["USD today", ({today}) => money(today, 2), "number"],
  ["Last 24 h", ({hours}) => spark(hours, 24)],
  ["", one => isAdmin() ? callerActions(one) : one.paused && small("paused"), "actions whole"]];
const RULES = [["Rule", "text", "whole"], ["Left", ({bucket}) => bucket && bucketBar(bucket),
  "whole"], ["Refused since the start", "refused", "number"]];
function openCallers(view, query) {
  let sought = query.get("filter") ?? "", loaded = 0, rules = [];
  const known = new Map(), filter = () => input("text", "Filter callers", {value: sought,
    id: "filter", type: "search", placeholder: "Filter ( / )", oninput({target}) {
      sought = target.value; }});
  view.draw = () => {
    const found = [...known.values()].filter(({name, team}) =>
      `${name} ${team ?? ""}`.toLowerCase().includes(sought.toLowerCase()));
    const shared = [...known.values()].flatMap(({buckets}) => buckets).filter(isOfAll);
    for (const rule of rules) rule.bucket = shared.find(one => one.rule === rule.text);
    return [h("div", "tools", filter(), plural(found.length, "caller")),
      known.size ? list(CALLERS, found) : firstCall(),
      rules.length > 0 && [h2("Rules"), list(RULES, rules, rule => "rule " + rule.text)]]; };
  view.bucket = bucket => [...known.values()].filter(({name, team}) => name === bucket.caller
    || isOfAll(bucket) || (!isOwn(bucket) && team === known.get(bucket.caller)?.team))
    .forEach(({buckets}) => update(buckets, bucket, "rule"));
  view.ended = call => known.has(call.caller) ? addTo(known.get(call.caller).today, call)
    : now() - loaded > 2 && load(view.changed);
  view.changed = async () => {
    loaded = now();
    ({rules} = await read("limits"));
    const {callers} = await read("callers", timeZone());
    for (const caller of callers) known.set(caller.name, caller); }; }
function addTo(sum, one) {
  for (const name of ["calls", "failed", "input", "output", "estimated", "unpriced", "usd"])
    sum[name] = Number(sum[name] ?? 0) + Number(one[name] ?? 0);
  return sum; }
function callerActions({name, buckets, paused, key}) {
  const own = buckets.filter(one => one.unit !== "running" && isOwn(one));
  const units = [...new Set(own.map(({unit}) => unit))];
  const fields = () => [input("amount", "Amount", {size: 4, required: true, inputmode: "decimal",
    value: !units[1] && Number(own[0].capacity)}), select("unit", units), small("for"),
    input("for", "For", {size: 3, value: "1d"})];
  const give = fields => attempt("Give", () => write("POST", pathOf("callers", name, "give"),
    fields), `${name} got ${fields.amount} ${fields.unit} more for ${fields.for}.`);
  return [units.length > 0 && asking("give " + name, "Give", fields(), give), buckets.length > 0
    && button("Reset", () => order("callers", name, "reset", ": all full.")),
    key && pauseButton(name, paused)]; }
function pauseButton(name, isPaused) {
  const calls = model.running.filter(call => call.caller === name && !call.ended);
  const told = `${plural(calls.length, "running call")} of ${name} will go on; new ones get 401.`;
  return isPaused ? button("Resume", () => order("keys", name, "restore", " may call again."))
    : asking("pause " + name, "Pause", small(told), () =>
    order("keys", name, "revoke", " is paused.")); }
// Usage: what was used, by whom; the chart and the table show the same numbers.
const RANGES = {__proto__: null, hour: ["quarter", "last hour"], day: ["hour", "last 24 hours"],
  week: ["day", "last 7 days"], month: ["day", "this month"], custom: ["day", "chosen days"]};
const GROUPS = {__proto__: null, caller: 1, team: 1, model: 1, upstream: 1, tag: 1};
const named = name => name === "-" ? "none" : name ?? "other"; // a group
const MEASURES = {__proto__: null, money: ["Money", ", USD", ({usd}) => Number(usd)],
  tokens: ["Tokens", "", tokensOf], calls: ["Calls", "", ({calls}) => calls]};
const LENGTHS = {quarter: HOUR / 4, hour: HOUR, day: DAY};
const midnight = (days, time = now()) => new Date(time * 1000).setHours(24 * days, 0, 0, 0) / 1000;
const monthStart = (time = now()) => midnight(1 - new Date(time * 1000).getDate(), time);
const ago = (number, length) => (Math.floor(now() / length) - number) * length;
const START = {hour: () => ago(3, HOUR / 4), day: () => ago(23, HOUR), week: () => midnight(-6),
  month: () => monthStart(), custom: from => dayStart(from)};
const dateOf = time => new Date(time * 1000).toLocaleDateString("sv"); // as fields have it
const dayStart = date => Date.parse(date + "T00:00") / 1000;
const only = (query, names) => Object.fromEntries([...query].filter(([name]) => name in names));
const changed = (query, change) => ({...Object.fromEntries(query), ...change});
function openUsage(view, query) {
  const pick = (name, values, usual) => query.get(name) in values ? query.get(name) : usual;
  const choices = (name, values, chosen) => h("span", {class: "choices", role: "group",
    "aria-label": name}, Object.keys(values).map(value => link("usage", changed(query,
    {[name]: value}), value, {"aria-current": value === chosen})));
  const range = pick("range", RANGES, "week"), by = pick("by", GROUPS, "caller");
  const measure = pick("measure", MEASURES, "money"), valueOf = MEASURES[measure][2];
  const isCustom = range === "custom", [from, to] = [query.get("from") ?? dateOf(midnight(-6)),
    query.get("to") ?? dateOf(now())].sort();
  const asked = () => ({by, step: RANGES[range][0], from: START[range](from), to: isCustom
    ? midnight(1, dayStart(to)) : Math.ceil(now()), ...timeZone(), ...only(query, GROUPS)});
  const date = (name, value) => input(name, title(name), {type: "date", value, required: true});
  const days = () => form(fields => go("usage", changed(query, fields)), null, date("from", from),
    " to ", date("to", to), " ", main("Show"));
  let usage = null, loaded = 0;
  view.changed = async () => {
    loaded = now();
    usage = await read("usage", asked());
    usage.groups.sort((a, b) => valueOf(b) - valueOf(a)); };
  view.draw = () => [h("div", "tools", choices("range", RANGES, range), isCustom && days(),
    choices("by", GROUPS, by), choices("measure", MEASURES, measure), button("CSV", () =>
    attempt("CSV", () => download(asked())))), chips("usage", query, GROUPS), usage.groups.length
    ? usageParts(usage, range, measure, query) : firstCall()];
  view.ended = () => now() - loaded > 15 && load(view.changed); }
async function download(asked) {
  const take = response => response.blob(), query = queryOf({...asked, format: "csv"});
  const href = URL.createObjectURL(await send("admin/api/usage" + query, {take}));
  h("a", {href, download: `usage-by-${asked.by}.csv`}).click();
  URL.revokeObjectURL(href); }
function usageParts(usage, range, measure, query) {
  const [name, unit, valueOf] = MEASURES[measure], isMoney = measure === "money";
  const series = seriesOf(usage.by, usage.groups.map(({name}) => name));
  const steps = stepsOf(usage.step, usage.series, ({groups}) => valuesOf(groups, series, valueOf));
  const all = valueOf(usage.total), length = LENGTHS[usage.step], rule = isMoney && usage.budget;
  const end = isMoney && range === "month" && monthStart(monthStart() + 32 * DAY);
  const pace = end && all / (now() - usage.from), ahead = pace * (end - usage.from);
  const budget = rule && {text: rule.rule, value: rule.usd / rule.seconds * length};
  const label = `${name} by ${usage.by}, ${RANGES[range][1]}${unit}`;
  return h("div", "columns", h("div", null, h2(label), h("div", "value", isMoney ? usd(all)
    : short(all)), chart({label, series, steps, isMoney, budget, end, pace: pace * length}),
    p(small(`Times in ${zone}.`, end && ` At this pace (dashed) ${usd(ahead, 2)} by its end.`))),
    usageTable(usage, series, query, valueOf)); }
function valuesOf(groups, series, valueOf) {
  const values = series.map(({name}) => Object.hasOwn(groups, name) ? valueOf(groups[name]) : 0);
  const rest = sumOf(Object.values(groups).map(valueOf)) - sumOf(values);
  return series.at(-1).name === null ? [...values.slice(0, -1), rest] : values; }
// Five groups and "other" (null). A group keeps its colour while the page is open.
const colours = new Map();
function seriesOf(by, names) {
  const series = names.slice(0, 5).map(name => ({name, colour: colours.get(by + name)}));
  for (const group of series) {
    const isFree = number => !series.some(({colour}) => colour === number);
    colours.set(by + group.name, group.colour ??= [1, 2, 3, 4, 5].find(isFree)); }
  return names.length > 5 ? [...series, {name: null, colour: 0}] : series; }
const stepEnd = (kind, at) => kind === "day" ? midnight(1, at) : at + LENGTHS[kind];
const stepsOf = (kind, told, valuesOf) => told.filter(({at}) => at < now()).map((part, number) =>
  ({...part, kind, end: told[number + 1]?.at ?? stepEnd(kind, part.at), values: valuesOf(part)}));
function usageTable(usage, series, query, valueOf) {
  const {total, by, groups} = usage, all = valueOf(total);
  const colour = name => series.find(group => group.name === name)?.colour ?? 0;
  const next = {by: by === "caller" ? "model" : "caller"};
  const closer = name => link("usage", changed(query, {[by]: name, ...next}), named(name));
  const numbers = [["Calls", sum => [count(sum.calls), below(sum.failed > 0 && sum.failed
    + " failed")], "number"], ["Tokens", sum => short(tokensOf(sum)), "number"], ["USD", sum =>
    money(sum, total.usd < 1 ? 4 : 2), "number"],
    ["%", sum => all ? usd(100 * valueOf(sum) / all, 0) : "–", "number"]];
  const group = ({name, told}) => told ?? [swatch(colour(name)), closer(name)];
  const columns = [[title(by), group, "whole"], ...numbers];
  const line = (sum, more) => row(columns, sum, sum.told ?? "of " + sum.name, more);
  return h("div", null, table(columns, [groups.slice(0, 20).map(group => line(group)), groups[20]
    && line(groups.slice(20).reduce(addTo, {told: "all others"})), line({...total, told: "Total"},
    {class: "total"})])); }
// Charts: stacked bars; a line follows the pointer or the arrow keys.
const EDGE = {left: 56, right: 16, top: 16, bottom: 24}, allOf = step => sumOf(step.values);
function ticks(top) { // round numbers from zero up, three to five of them
  const power = 10 ** Math.floor(Math.log10(top / 4));
  const step = [1, 2, 5, 10].map(number => number * power).find(step => top / step <= 4.5);
  return Array.from({length: Math.ceil(top / step) + 1}, (_, at) => at * step); }
function scaleOf({steps, end, budget, pace}, {width, height}) {
  const top = Math.max(...steps.map(allOf), pace || 0) || 1, from = steps[0].at;
  const isNear = budget && budget.value < 3 * top; // one far above would flatten all else
  const lines = ticks(isNear ? Math.max(top, budget.value) : top), floor = height - EDGE.bottom;
  const right = width - EDGE.right, span = (end || steps.at(-1).end) - from;
  const x = time => EDGE.left + (time - from) / span * (right - EDGE.left);
  return {width, floor, lines, isNear, right, x, middle: ({at, end}) => (x(at) + x(end)) / 2,
    y: value => floor - value / lines.at(-1) * (floor - EDGE.top)}; }
function chart(data) {
  const seen = $("chart")?.getBoundingClientRect();
  if (!seen) setTimeout(paint); // now its width is known
  const scale = scaleOf(data, seen?.width ? seen : {width: 640, height: 300});
  const {steps, label} = data, at = view.pointed ?? -1;
  const point = to => {
    view.pointed = Math.max(-1, Math.min(steps.length - 1, to));
    if (view.pointed !== at) paint(true); };
  const onkeydown = event => {
    const to = {ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: steps.length}[event.key];
    if (to === undefined) return;
    event.preventDefault();
    point(to < -1 ? steps.length : to); };
  return h("div", "chart live", svg("svg", {id: "chart", tabindex: 0, role: "img",
    "aria-label": label + ". The table has the same numbers.", onkeydown, onblur: () => point(-1),
    onpointermove: ({offsetX}) => point(steps.findIndex(({end}) => offsetX < scale.x(end))),
    onpointerleave: () => point(-1)}, chartParts(data, scale, steps[at])), steps[at]
    && valueTable(data, steps[at], scale)); }
function chartParts({steps, series, budget, pace}, scale, step) {
  const digits = Math.max(0, -Math.floor(Math.log10(scale.lines[1]) + 1e-9)), x = scale.middle;
  const number = value => value && digits ? value.toFixed(digits) : short(value);
  const line = (kind, value, from) => svg("line", {class: kind, x1: from, x2: scale.right,
    y1: scale.y(value), y2: scale.y(value)});
  const say = (x, y, end, text, kind) => svg("text", {class: kind, x, y, "text-anchor": end}, text);
  return [scale.lines.map(value => [line("grid", value, EDGE.left), say(EDGE.left - 8,
    scale.y(value) + 4, "end", number(value))]), labelled(steps, scale).map(step => say(x(step),
    scale.floor + 18, "middle", (step.kind === "day" ? day : hour)(step.at))),
    pace > 0 && line("ahead", pace, scale.x(steps.at(-1).end)), steps.map(step =>
    [bar(step, series, scale), step.end > now() && say(x(step), scale.y(allOf(step)) - 5,
    "middle", "so far", "said")]), scale.isNear && [line("budget", budget.value, EDGE.left),
    say(EDGE.left + 4, scale.y(budget.value) - 5, "start", "budget: " + budget.text, "said")], step
    && svg("line", {class: "cursor", x1: x(step), x2: x(step), y1: EDGE.top, y2: scale.floor})]; }
function labelled(steps, scale) { // those at round times, at most one in 64 pixels
  const [{kind, at, end}] = steps, room = 64 / (scale.x(end) - scale.x(at));
  const every = [1, 2, 3, 4, 6, 7, 12, 14, 24].find(number => number >= room) ?? 31;
  const hourOf = ({at}) => new Date(at * 1000).getHours();
  return steps.filter((step, number) => (kind === "hour" ? hourOf(step) : number) % every === 0); }
function bar(step, series, scale) {
  const width = Math.max(1, Math.min(48, (scale.x(step.end) - scale.x(step.at)) * .75));
  const x = scale.middle(step) - width / 2, y = scale.y(allOf(step)), height = scale.floor - y;
  const top = at => scale.y(sumOf(step.values.slice(at))), opacity = step.end > now() ? .5 : 1;
  return [series.map(({colour}, at) => svg("rect", {style: `fill: var(--s${colour})`, x, width,
    y: top(at), height: top(at + 1) - top(at), opacity})), height > 0 && svg("path", {class:
    "total", d: `M${x} ${y}h${width}`})]; }
function valueTable({series, isMoney}, step, scale) {
  const format = value => isMoney ? usd(value, allOf(step) < 1 ? 4 : 2) : count(value);
  const when = day(step.at) + (step.kind === "day" ? "" : " " + hour(step.at));
  const line = (name, value) => h("tr", null, h("td", null, name), h("td", "number", value));
  const x = scale.middle(step), isLeft = x < scale.width / 2;
  const style = isLeft ? `left: ${x + 12}px` : `right: ${scale.width - x + 12}px`;
  return h("table", {class: "values", style}, h("tbody", null, line(when + (step.end > now()
    ? ", so far" : ""), ""), series.map(({name, colour}, at) =>
    step.values[at] > 0 && line([swatch(colour), named(name)], format(step.values[at]))),
    line("Total", format(allOf(step))))); }
// Calls: the live list; a row opens to where its time and money went.
const FILTERS = {...GROUPS, outcome: 1, failed: 1, slow: 1, id: 1, __proto__: null};
const OUTCOMES = {ok: "good", limited: "warn", refused: "warn", caller_gone: "warn"}; // else "bad"
const outcomeMark = call => call.outcome ? mark(OUTCOMES[call.outcome] ?? "bad", outcomeOf(call))
  : mark("off", stateOf(call));
const CALLS = [["Time", ({time}) => moment(time), "line whole"], ["Caller", callerOf],
  ["Model", "model"], ["Outcome", outcomeMark], ["Tokens", call => count(tokensOf(call)), "number"],
  ["USD", call => money(call, 4), "number"], ["ms", "ms", "number"]];
function chips(tab, query, names) { // what narrows a view: a click takes it away
  const texts = {failed: () => "failed", slow: value => "slower than " + seconds(value / 1000)};
  return h("div", "tools", Object.entries(only(query, names)).map(([name, value]) =>
    chip((texts[name]?.(value) ?? `${name}: ${value}`) + " ×", () =>
    go(tab, changed(query, {[name]: ""}))))); }
// What a call is found by, as the sums have it: its model is the one that answered.
const nameOf = (call, name) => (name === "model" && call.served) || call[name] || "-";
const keyOf = ({time, id}) => time + " " + id; // callers may choose one id twice
// "model:x", "slow:2" (seconds), "failed", an id, or else a caller
function meaning(text) {
  const [, name, value] = /^(\w+):(.+)$/.exec(text) ?? [null, text, ""];
  if (name === "slow") return {slow: 1000 * (Number(value) || 10)};
  if (name in FILTERS && (value || name === "failed")) return {[name]: value || 1};
  return /^[0-9a-f]{8}-[0-9a-f-]{27}$/.test(text) ? {id: text} : {caller: text}; }
const isLike = (call, {failed, slow, ...same}) => (!slow || call.ms >= slow)
  && (!failed || !["ok", "limited", "caller_gone", undefined].includes(call.outcome))
  && Object.entries(same).every(([name, value]) => nameOf(call, name) === value);
async function openCalls(view, query) {
  const chosen = only(query, FILTERS), calls = [], fresh = [];
  const narrow = text => go("calls", {...chosen, ...meaning(text)});
  const older = before => load(async () => {
    const page = await read("calls", {...chosen, before, limit: 50});
    calls.splice(before ? calls.length : 0, Infinity, ...page.calls);
    view.before = page.next;
    if (chosen.id) calls.forEach(call => view.open.add(keyOf(call))); });
  // New calls come on top, but not while somebody reads: then a button tells how many there are.
  const isRead = () => view.open.size || scrollY > 200 || one(STILL);
  const take = () => calls.unshift(...fresh.splice(0)) > 500 && show(); // no list grows for ever
  const filter = () => form(({text}) => text.trim() && narrow(text.trim()), null, h("input", {
    id: "filter", name: "text", type: "search", size: 26, placeholder: "alice or model:gpt-4 ( / )",
      "aria-label": "Filter: a caller, or model:, upstream:, team:, outcome:, slow: and a value"}));
  view.open = new Set();
  view.ended = call => isLike(call, chosen) && fresh.unshift(call) > 200 && fresh.pop();
  const running = () => model.running.map(call => ({...call, time: call.started,
    ms: 1000 * (now() - call.started)})).filter(call => !call.ended && isLike(call, chosen));
  view.draw = () => {
    if (!isRead()) take();
    const live = query.size ? running().map(call => row(CALLS, call, call.key)) : [];
    const known = new Map(calls.map(call => [keyOf(call), callRows(CALLS, call)])); // or told twice
    const rows = [...live, ...known.values()];
    const isEnd = view.before == null, further = calls.length ? "Older calls" : "Look further back";
    const none = isEnd ? "No such call so far. " : "None among the latest calls so far. ";
    return [h("div", "tools", filter(), chip("Failed", () => narrow("failed")), chip("Slow", () =>
      narrow("slow")), fresh.length > 0 && button(plural(fresh.length, "new call"), take)),
      chips("calls", query, FILTERS), rows.length ? table(CALLS, rows) : query.size
      ? p(none, link("calls", {}, "Show all calls")) : firstCall(), !isEnd
      && button(further, () => older(view.before))]; };
  view.lost = () => older();
  await older(); }
function callRows(columns, call) {
  const key = keyOf(call), isOpen = view.open.has(key);
  const toggle = () => view.open[isOpen ? "delete" : "add"](key);
  return [row(columns, call, key, {...opens(toggle), "aria-expanded": String(isOpen),
    class: isOpen && "open"}), isOpen && h("tr", {class: "open", "data-key": "of " + key},
    h("td", {colspan: columns.length, class: "whole"}, callParts(call)))]; }
// Where the time went: a name, milliseconds, and the reason where this is most of it.
function phasesOf({queue_ms, connect_ms, first_ms, ms, upstream, input, output}) {
  const line = queue_ms ?? 0, connect = connect_ms ?? 0, name = upstream ?? "it";
  const first = Math.max(0, (first_ms ?? ms) - line - connect);
  const rest = Math.max(0, ms - line - connect - first), pace = count(1000 * output / rest);
  return [["in line", line, `all places at ${name} were taken`],
    ["connecting", connect, `${name} was slow to take a connection`],
    ["to first byte", first, `${name} took so long to begin, for ${count(input)} tokens`],
    ["streaming", rest, `${count(output)} tokens of output, ${pace} a second`]]; }
const CAUSES = {model_has_no_price: "its model has no price: PRICES or UNPRICED can give it one"};
function callParts(call) {
  const phases = phasesOf(call), [name, most, why] = phases.reduce((a, b) => b[1] > a[1] ? b : a);
  const facts = {[call.outcome === "limited" ? "Rule" : "Cause"]: CAUSES[call.cause] ?? call.cause,
    Status: call.status, Upstream: call.upstream, From: call.address, Agent: call.agent,
    Charged: call.charges && call.charges.split(";").map(charge), Tag: call.tag,
    Input: plural(call.input, "token"), Cached: call.cached > 0 && count(call.cached),
    Output: plural(call.output, "token"), Reasoning: call.reasoning > 0 && count(call.reasoning),
    "Served by": call.served !== call.model && call.served, Path: `${call.method} ${call.path}`,
    Redacted: call.redacted, "Request id": [call.id, " ", copyButton("Copy", call.id)]};
  const told = Object.entries(facts).filter(([, value]) => value || value === 0);
  const bar = phases.map(([, ms], at) => ms > 0
    && h("div", {style: `background: var(--s${at + 1}); flex-grow: ${ms}`}));
  const all = name => link("calls", {[name]: nameOf(call, name)}, nameOf(call, name));
  return [most > 9 && p(`Mostly ${name}, ${count(most)} of ${count(call.ms)} ms: ${why}.`),
    most > 0 && h("div", "timing", bar), most > 0 && h("div", "tools",
    phases.map(([name, ms], at) => h("span", null, swatch(at + 1), `${name} ${count(ms)} ms`))),
    h("dl", null, told.map(([name, value]) => [h("dt", null, name), h("dd", null, value)])),
    !isMe && p("All calls of ", all("caller"), " or ", all("model"))]; }
function charge(text) { // "rule=amount", of money in picodollars
  const [, rule, amount] = /^(.*)=(.*)$/.exec(text) ?? [null, text, 0];
  return h("div", null, / usd /.test(rule) ? usd(amount / 1e12) : count(amount), ": ", rule); }
// Keys: the table, and one form that makes a key or changes one.
const FIELDS = {name: "alice", limits: "1 usd per day; 2 running", expires: "30d",
  models: "gemma*,gpt-4*", team: "", upstream: "", redact: "", tag: "", note: ""};
const EXAMPLES = ["1 usd per day", "60 requests per minute", "100000 tokens per day"];
const KEYS = [["Name", ({name, note}) => [link("calls", {caller: name}, name), below(note)],
  "whole"], ["Role", ({role, team}) => [role, below(team)], "line"],
  ["Limits", ({limits, models}) => [limits || small("general rules"), below(models)]],
  ["Expires", ({expires}) => expires ? year(expires) : "never", "line"],
  ["Last used", ({last_used}) => last_used ? moment(last_used) : "never", "line"],
  ["State", ({disabled, expires}) => disabled ? mark("off", "paused")
    : expires && expires < now() ? mark("bad", "expired") : mark("good", "valid"), "line"]];
function openKeys(view) {
  const columns = isAdmin() ? [...KEYS, ["", keyActions, "actions whole"]] : KEYS;
  let keys = [];
  view.changed = async () => { ({keys} = await read("keys")); };
  view.draw = () => [made && madeKey(made), h("div", isAdmin() && "columns form", h("div", null,
    keys.length ? list(columns, keys) : noKey()), isAdmin() && keyForm(keys.find(({name}) =>
    view.asked === "edit " + name)))]; }
const noKey = () => empty(model.keys_are_asked_for ? "No key is stored."
  : "Whoever reaches this proxy may call, until the first key is stored. Make one here, or so:",
  "python llm_proxy.py keys add alice --limits '1 usd per day'");
function keyActions({name, disabled}) {
  const path = pathOf("keys", name);
  const ask = (text, told, act) => asking(`${text} ${name}`, text, small(told), act);
  const rotate = () => attempt("Rotate", async () => {
    keep(await write("POST", path + "/rotate", {grace: "1h"})); });
  const remove = () => attempt("Remove", () => write("DELETE", path), name + " is removed.");
  return [opener("Edit", "edit " + name), ask("Rotate", "The old secret works for one more hour.",
    rotate), pauseButton(name, disabled), ask("Remove", "For ever; its books stay.", remove)]; }
function keyForm(key) {
  const field = name => h("label", null, small(title(name)), h("input", {name, autocomplete: "off",
    class: name === (key ? "limits" : "name") && (key || innerWidth > 1099) && "asked",
    placeholder: FIELDS[name], value: name === "expires" ? null : key?.[name]}));
  const save = async fields => {
    const body = Object.fromEntries(Object.entries(fields).filter(([name, value]) => value
      || (key && name !== "expires")));
    const done = await attempt(key ? "Change" : "Making a key", () => key
      ? write("PATCH", pathOf("keys", key.name), body) : write("POST", "keys", body));
    if (done?.key) keep(done);
    if (done) ask(null); };
  const example = text => chip(text, ({target: {form: {limits}}}) => {
    limits.value = [limits.value, text].filter(Boolean).join("; "); });
  const [name, limits, ...more] = Object.keys(FIELDS).map(field);
  const role = select("role", ["caller", "viewer", "admin"], key?.role);
  return h("details", {class: "side", open: key || innerWidth > 1099, "data-key": key?.name
    + (made?.key ?? "")}, h("summary", null, key ? "Change " + key.name : "New key"),
    form(save, null, !key && name, limits, h("div", "tools", EXAMPLES.map(example)),
    h("details", {open: key}, h("summary", null, "More"), more, h("label", null, small("Role"),
    role)), key ? answers("Save") : main("Make key"))); }
const keep = key => attempt("Asking for a model", async () => { // that it may call, to be shown
  made = key;
  const {models} = await post("upstreams", key.upstream ?? model.upstreams[0].name, "test");
  key.model = models.find(name => name.startsWith((key.models ?? "").split(/[*?[,]/)[0])); });
function curlLine(key, name) { // that makes a call here
  const known = model.upstreams.flatMap(({model, models, known}) => model ?? [...models, ...known]);
  const body = JSON.stringify({model: name ?? known.find(name => !/[*?[]/.test(name)) ?? "MODEL",
    messages: [{role: "user", content: "Hello"}]});
  return [`curl ${new URL("v1/chat/completions", location.href)}`,
    "-H 'Content-Type: application/json'", `-H 'Authorization: Bearer ${key}'`,
    `-d '${body.replaceAll("'", "'\\''")}'`].join(" \\\n  "); }
const madeKey = ({name, key, role, model}) => h("section", {class: "box", "data-key": key},
  h2(`The key of ${name}, shown only now`), pre(key), p(copyButton("Copy key", key)),
  role === "caller" && command(curlLine(key, model), link("calls", {caller: name},
  `Watch the calls of ${name}`)));
// Upstreams: state, load and latency of each; admins may test one, and take it out.
const loadOf = ({in_flight, max_concurrency: most}) => in_flight + (most ? " of " + most : "");
const UPSTREAMS = [["Name", "name", "line whole"], ["State", stateMark, "line"],
  ["Addresses", "addresses", "line"], ["In flight", loadOf, "number"],
  ["In line", "waiting", "number"], ["Longest wait, ms", "longest_ms", "number"],
  ["First byte, ms", "first_p50", "number"], ["95% within", "first_p95", "number"],
  ["Models", ({model, models}) => model || models?.join(", ") || "all"]];
function openUpstreams(view) {
  const columns = isAdmin() ? [...UPSTREAMS, ["", upstreamActions, "actions whole"]] : UPSTREAMS;
  view.draw = () => list(columns, model.upstreams); }
function upstreamActions({name, state}) {
  const test = () => attempt("Test", async () => {
    const {ok, ms, models, fault} = await post("upstreams", name, "test");
    const found = () => `ok, ${count(ms)} ms, ${plural(models?.length ?? 0, "model")}`;
    notice(`Test of ${name}: ${ok ? found() : fault}`, ok ? "good" : "bad", 30); });
  const set = (verb, done) => order("upstreams", name, verb, done);
  return [button("Test", test), state !== "disabled" ? asking("disable " + name, "Disable",
    small("New calls go elsewhere, or get 404."), () => set("disable", " takes no new calls."))
    : button("Enable", () => set("enable", " takes calls again."))]; }
// Audit: who changed what.
const AUDIT = [["Time", ({time}) => moment(time), "line"],
  ["Who", ({who, role}) => [who, small(" ", role)]], ["What", "what"], ["Target", "target"],
  ["From", "address"], ["Detail", "detail", "whole"]];
function openAudit(view) {
  let rows = [], next = null;
  const take = async (known, before) => {
    const page = await read("audit", {before});
    [rows, next] = [[...known, ...page.rows], page.next]; };
  view.changed = () => take([]);
  view.draw = () => [rows.length ? list(AUDIT, rows, ({id}) => String(id))
    : p("Nothing was changed yet. What is changed will be listed here, and by whom."),
    next != null && button("Older", () => load(() => take(rows, next)))]; }
// One's own page: what is left, when there is more, the last calls, a month of days.
async function openMe(view) {
  const {now: told, caller, role, today, calls, days, buckets, warning} =
    await send("v1/quota" + queryOf(timeZone()));
  const doubt = doubts(today).join(", "), columns = CALLS.filter(([head]) => head !== "Caller");
  const label = "Tokens by day, last 30 days", series = [{name: "tokens", colour: 1}];
  model = {upstreams: [], you: {name: caller, role}, has_calls: calls.length > 0};
  setClock(told);
  view.open = new Set();
  setInterval(paint, 1000);
  view.draw = () => {
    const steps = stepsOf("day", days, sum => [tokensOf(sum)]);
    return [h2(`What ${caller} has left`), warning && p(mark("warn", warning)),
      buckets.map(bucketBar), !buckets.length && p("No limit holds for this key."), h2("Today"),
      p(`${plural(today.calls, "call")}, ${short(tokensOf(today))} tokens, ${usd(today.usd)} USD`,
      doubt && ` (${doubt})`, `, as of ${clock(told)}, ${zone} `, button("Refresh", again)),
      calls.length > 0 && [h2(label), chart({steps, label, series})], h2("Last calls"),
      calls.length ? table(columns, calls.map(call => callRows(columns, call))) : firstCall()]; }; }
// Where one is: the tab and its filters stand in the address, so Back works and a view has a name.
const VIEWS = {__proto__: null, now: openNow, callers: openCallers, usage: openUsage,
  calls: openCalls, keys: openKeys, upstreams: openUpstreams, audit: openAudit};
const hashOf = (tab, query = {}) => "#" + tab + queryOf(query);
const go = (tab, query) => { location.hash = hashOf(tab, query); };
async function show() {
  const [name, query] = location.hash.slice(1).split("?"), mine = view = {isLoading: true};
  made = null;
  const tab = name in VIEWS ? name : "now";
  try {
    if (!isMe && !model) await loadSummary();
    if (view !== mine) return; // somebody went on meanwhile
    patchChildren($("tabs"), isMe ? [] : Object.keys(VIEWS).map(name =>
      link(name, {}, title(name), {"aria-current": name === tab})));
    $("main").replaceChildren();
    await (isMe ? openMe : VIEWS[tab])(mine, new URLSearchParams(query));
    await mine.changed?.();
    $("head").hidden = false;
    $("who").textContent = `${model.you.name} (${model.you.role})`;
  } catch (fault) {
    if (fault.status === 403) return leave("This key may call, but not look here.");
    mine.draw = () => [p(mark("bad", "This could not be shown: " + fault.message)),
      button("Try again", again)]; }
  mine.isLoading = false;
  if (view !== mine) return;
  paint(true);
  one("main .asked")?.focus(); }
async function start() { // anew with each log-in and log-out
  if (!sessionStorage.getItem(KEY)) return showLogin();
  onhashchange = show;
  await show();
  if (model && !isMe) listen(); }
function showLogin() {
  const fault = sessionStorage.getItem(FAULT);
  sessionStorage.removeItem(FAULT);
  const logIn = ({key}) => {
    sessionStorage.setItem(KEY, key.trim());
    again(); };
  const field = {type: "password", name: "key", autocomplete: "current-password", required: true};
  $("main").replaceChildren(form(logIn, {class: "login"}, h2("llm_proxy"), h("label", null,
    small(isMe ? "Your key" : "Key of an admin or a viewer"), h("input", field)),
    p(fault && mark("bad", fault)), main("Log in"), " ", !isMe && h("a", {href: "me"},
    "What have I left?")));
  one(".login input").focus(); }
const again = () => location.reload();
function leave(fault) { // who logs in then has nothing of what was shown, or asked for
  sessionStorage.removeItem(KEY);
  sessionStorage.setItem(FAULT, fault);
  again(); }
function setTheme(theme) { // as CSS has color schemes
  document.documentElement.style.colorScheme = localStorage[THEME] = $("theme").value = theme; }
function press(event) {
  if (event.key === "/" && $("filter") && !event.target.matches("input, select")) {
    event.preventDefault();
    $("filter").focus(); }
  if (event.key !== "Escape" || !model) return;
  if (view.asked) return ask(null);
  view.pointed = -1;
  view.open?.clear();
  $("notices").replaceChildren(); }
[$("leave").onclick, onkeydown] = [() => leave(""), press];
onsubmit = event => event.preventDefault();
for (const name of ["click", "input", "keydown"]) addEventListener(name, () => paint(true));
// Without a stream while nobody looks: a browser has but six connections to one host.
document.onvisibilitychange = () => document.hidden ? stream?.abort() : model && !isMe && listen();
$("theme").onchange = () => setTheme($("theme").value);
setTheme(localStorage[THEME] ?? "light dark");
start();
</script>"""
PAGE_LINES = """Cache-Control: no-store
Referrer-Policy: no-referrer
X-Content-Type-Options: nosniff
Content-Security-Policy: default-src 'none'; script-src 'nonce-%NONCE%'; style-src 'nonce-%NONCE%';
 connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'
""".replace("\n ", " ").splitlines()


# Paths of the page, and where those lead that are nearly so: its own addresses are relative.
PAGE_PATHS = {"/dashboard": None, "/me": None, "/admin": "dashboard", "/admin/": "../dashboard",
              "/dashboard/": "../dashboard", "/me/": "../me"}


async def send_dashboard(request, reply):
    """Sends the page: open to all, as it holds no data. Only scripts and styles with the nonce of
    this answer run in it."""
    place = PAGE_PATHS[request.path]
    if place:
        return reply.send(307, b"", ["Location: " + place])
    nonce = os.urandom(16).hex()
    page, *lines = [text.replace("%NONCE%", nonce) for text in (DASHBOARD, *PAGE_LINES)]
    reply.send(200, page.encode(), lines, "text/html; charset=utf-8")


def find_dashboard(request: Request) -> Optional[Page]:
    """Returns what answers where the page is asked for, all of it or one's own use; else None."""
    is_asked = request.path in PAGE_PATHS and request.method in ("GET", "HEAD")
    return send_dashboard if is_asked else None


# --------------------------------------------------------------------------------------------------
# Server: the front door. ThreadingHTTPServer accepts in a thread of its own and hands each socket
# to the loop, where a ClientConnection reads one request after another; caps, TLS and draining are
# decided here. It knows neither tokens nor prices.
# --------------------------------------------------------------------------------------------------

class QuietEnd(Exception):
    """The connection is closed without a word: no request was begun."""


class ClientConnection:
    """One client's connection, run by one task: its state is the line at which that stands."""
    HEAD_SECONDS = 15         # from a head's first byte to its last; also for the very first byte
    IDLE_SECONDS = 75         # between two requests
    HALF_CLOSE_SECONDS = 0.5  # a client that closed its sending side still gets a prompt answer
    HANG_UP_SECONDS = 0.2     # between two looks at a client that sent too far ahead to be read
    LINGER_SECONDS = 5        # of silence, after an answer to a request that is not whole
    LINGER_TOTAL_SECONDS = 30
    MAX_LINGER_BYTES = 64 << 20
    GOODBYE_SECONDS = 1       # so that the last answer is read before the close

    reply: Optional[Reply] = None   # while a request is answered
    last: Optional[Request] = None
    served = False                  # a request was answered
    idle = True                     # no request is being answered
    full_timer = leave_timer = None

    def __init__(self, server, sock, peer, address):
        """`address` is what connections are counted by."""
        self.server = server
        self.proxy = server.proxy
        self.loop = server.loop
        self.peer = peer
        self.address = address
        self.client = Stream(self.loop, sock)
        self.context = Context(self.loop)
        self.context.on_connect = self.on_connect
        self.client.on_end = self.on_client_end
        self.client.on_full = self.on_client_full
        self.client.on_write_failed = self.on_client_lost

    def __repr__(self) -> str:
        """One line, for `kill -USR1` and a debugger."""
        reply = self.reply
        if reply is None or reply.request is None:
            return f"{self.address} {self.context!r}"
        entry = reply.entry
        return "%s %s %s %.1fs upstream=%s %r unsent=%d" % (
            entry.caller.label if entry.caller else self.address, entry.method, entry.path[:200],
            self.loop.time() - entry.started, entry.upstream or "-", self.context,
            len(self.client.write_buffer))

    # -- what the client does while its call awaits something else

    def on_client_end(self):
        """Notes that the client closed its sending side: a goodbye or a half-close, which only time
        tells."""
        if self.client.failure:
            self.on_client_lost()
        else:
            self.leave_timer = self.loop.call_later(self.HALF_CLOSE_SECONDS, self.on_client_lost)

    def on_client_lost(self):
        self.context.end(CallerGone())

    def on_client_full(self):
        """Looks for the client's leaving, as nothing more is read from it."""
        if self.full_timer:  # one look at a time
            self.full_timer.cancel()
        if len(self.client.read_buffer) < MAX_READ_AHEAD or self.client.reading:
            return
        if self.client.has_hung_up() or not CAN_POLL:  # so far ahead it has no business here
            self.on_client_lost()
        elif not self.client.ended:
            self.full_timer = self.loop.call_later(self.HANG_UP_SECONDS, self.on_client_full)

    def on_connect(self, seconds):
        """Adds up how long its call has waited for connections to upstreams."""
        if self.reply:
            entry = self.reply.entry
            entry.connect_ms = (entry.connect_ms or 0) + int(seconds * 1000)
            entry.held_up += seconds

    def end_if_idle(self):
        """Closes the connection if it is idle, because the server stops; a request that has come
        whole is answered."""
        if self.idle:
            self.client.on_readable()  # input that was not read yet
            if b"\r\n\r\n" not in self.client.read_buffer:
                self.context.end(QuietEnd())

    # -- its life

    async def converse(self, refusal=None):
        """Answers requests, or only says `refusal`."""
        try:
            if refusal:
                self.refuse(self.new_reply(), refusal)
            elif not self.client.encrypted or await self.shake_hands():
                with suppress(QuietEnd, TimeoutError):
                    while await self.exchange():
                        if self.client.read_buffer:  # requests that never wait would hold the loop
                            await asyncio.sleep(0)
            await self.say_goodbye()
        except (QuietEnd, CallerGone):
            pass
        except OSError as failure:
            if isinstance(failure, ssl.SSLError) and not self.served:
                self.record_tls_failure(failure)
        except Exception:
            self.proxy.books.log.report()
        finally:
            self.reply = None
            self.client.close()
            self.context.close()
            self.server.forget(self)

    def record_tls_failure(self, failure):
        """Records a failed handshake. A client that does not trust our certificate says so when it
        should send its request, at the latest."""
        entry = Entry(self.address, self.peer)
        entry.outcome = "refused"
        entry.cause = "TLS failed: %s" % (failure.reason or "cut").lower().replace("_", " ")
        self.proxy.books.record(entry)

    async def shake_hands(self):
        """Returns False for a client that does not speak TLS, which is told so."""
        if not self.proxy.callers.trusts(self.peer):
            await self.await_turn(self.server.handshakes.seconds_to_turn(self.address))
        try:
            await self.client.handshake(self.context, self.HEAD_SECONDS)
            return True
        except ssl.SSLError as failure:
            if failure.reason != "HTTP_REQUEST":
                raise
            self.client.give_up_tls()
            self.refuse(self.new_reply(), BadRequest("This port speaks https", close_after=True))
            return False

    async def await_turn(self, seconds):
        """Waits for a time, unless the client leaves: nothing reads what it sends meanwhile."""
        while seconds > 0:
            if self.client.has_hung_up():
                raise QuietEnd
            await self.context.sleep(
                min(seconds, self.HANG_UP_SECONDS), "its turn for a TLS handshake")
            seconds -= self.HANG_UP_SECONDS

    def new_reply(self):
        self.reply = Reply(self.client, self.context, self.server.common,
                           Entry(self.address, self.peer))
        return self.reply

    async def exchange(self) -> bool:
        """Answers one request, once its first byte has come; returns whether another one may
        follow. Raises TimeoutError where none comes."""
        context, client = self.context, self.client
        context.until = inf
        context.reason = None
        self.reply = None
        self.idle = True
        if not client.read_buffer:
            if self.server.draining:
                self.end_if_idle()
            seconds = self.IDLE_SECONDS if self.served else self.HEAD_SECONDS
            if not await client.more(context, seconds, "a request"):
                return False
        reply = self.new_reply()
        try:
            try:
                head = client.take_head() or await self.read_head()
                self.idle = False
                reply.entry.started = self.loop.time()
                self.last = request = Request.read(head, self.last)
                reply.take(request)
                if self.server.draining:
                    reply.close_after = True
                respond = request.cache.get("respond") or self.find_responder(request)
                await respond(request, reply)
            except QuietEnd:
                raise
            except Exception as failure:
                self.refuse(reply, failure)
            if client.write_buffer or client.write_failed:
                await self.finish(reply)
        finally:
            if reply.request or reply.begun:
                self.record(reply)
        return not reply.close_after

    async def read_head(self):
        """Returns a head that comes in pieces. Raises what is to be answered instead."""
        client = self.client
        try:
            data = await client.read_head(
                REQUEST_LINE, self.context, self.HEAD_SECONDS, "the request's head")
        except TimeoutError:
            if not client.read_buffer:  # nothing came but empty lines
                raise QuietEnd from None
            raise RequestTimeout from None
        except OSError:
            raise QuietEnd from None  # reset between two requests
        if data is None:
            raise QuietEnd
        return data

    def find_responder(self, request):
        """Returns what answers requests with this head, a page or the proxy. Raises a Refusal for
        what is answered by neither."""
        origins = self.server.common.origins
        respond = self.server.admin.page(request)
        if respond is None or not origins.is_own(request):
            origins.check(request.method, request)
        if request.method in ("TRACE", "TRACK", "CONNECT"):
            raise MethodNotAllowed  # an upstream that echoes what it got would show its key
        if "upgrade" in request.lines and request.version and (  # RFC 9110 7.8
                "websocket" in request.get("upgrade").lower()):
            raise UpgradeRequired
        respond = (respond or find_dashboard(request) or self.server.pages.find(request)
                   or self.proxy.serve)
        request.cache["respond"] = respond
        return respond

    def refuse(self, reply, failure):
        """Turns what was raised into an answer: the only place that does."""
        self.idle = False
        if isinstance(failure, CallerGone):
            reply.stop_comments()
            reply.entry.outcome = failure.outcome
            reply.entry.status = reply.entry.status or 499  # nginx's number for it
            reply.close_after = True
            reply.reset = reply.begun and reply.until_close
            return
        if not isinstance(failure, Refusal):
            self.proxy.books.log.report()
            failure = InternalError()
        reply.refuse(failure)

    async def finish(self, reply):
        """Waits until the answer was taken."""
        try:
            if not reply.reset:
                await reply.drain()
        except (CallerGone, Stopped) as reason:
            if not reply.missed_nothing():
                reply.entry.outcome = reason.outcome
            reply.close_after = reply.reset = True

    def record(self, reply):
        """Records how the request went."""
        if reply.comment_timer:
            reply.stop_comments()
        if self.leave_timer:
            self.leave_timer.cancel()
        if reply.body:
            reply.body.release()
        self.served = True
        self.proxy.books.record(reply.entry)

    async def say_goodbye(self):
        """Closes so that the last answer is read: closing on unread bytes sends a reset, which
        could erase it (RFC 9112 9.6)."""
        reply, client = self.reply, self.client
        if reply and reply.reset:
            return client.reset_on_close()
        client.shut_down_writing()
        if not reply or not reply.begun:
            return
        seconds = total = self.GOODBYE_SECONDS
        if reply.request and not reply.body_is_taken():  # it may still be sending what was refused
            seconds, total = self.LINGER_SECONDS, self.LINGER_TOTAL_SECONDS
        else:
            self.server.let_go(self)
        self.reply = None
        await self.linger(seconds, total)

    async def linger(self, seconds, total):
        """Reads on until the client closes, too."""
        client, context = self.client, self.context
        client.discarding = False
        context.reason = None
        context.until = self.loop.time() + total
        self.idle = True
        dropped = 0
        with suppress(TimeoutError):
            while dropped < self.MAX_LINGER_BYTES and not self.server.draining:
                dropped += len(client.take_all())
                if not await client.more(context, seconds, "the client's goodbye"):
                    break


class LoopWatch:
    """Notices when something held the loop, and says so once a minute at most. The accepting thread
    looks meanwhile at what that is. Where the process had hardly any CPU, it was the machine."""
    PERIOD = 0.25          # seconds, of looks at the loop, and what is too long

    culprit = ""
    thread = 0  # the loop's thread, once it runs
    used = 0.0  # seconds of CPU, until the last look

    def __init__(self, proxy: Proxy):
        self.loop = proxy.loop
        self.log = proxy.books.log
        self.metrics = proxy.watchers.metrics
        self.due = self.loop.time()

    def tick(self):
        """Runs on the loop."""
        now = self.loop.time()
        late = now - self.due
        if late > self.PERIOD and self.thread:
            self.metrics.held += late
            self.log.say(
                f"the event loop was held for {late:.2f} s{self.culprit}: the process had"
                f" {time.process_time() - self.used:.2f} s of CPU", "loop")
        self.metrics.sort_in()
        self.culprit = ""
        self.used = time.process_time()
        self.thread = threading.get_ident()
        self.due = now + self.PERIOD
        self.timer = self.loop.call_at(self.due, self.tick)

    def look(self):
        """Runs in the accepting thread."""
        if self.thread and self.loop.time() > self.due + self.PERIOD:
            frame = sys._current_frames().get(self.thread)
            while frame and frame.f_code.co_filename != __file__:
                frame = frame.f_back
            if frame:
                self.culprit = f" by {frame.f_code.co_name}, line {frame.f_lineno}"


class Handshakes:
    """Gives each address 20 turns a second for TLS handshakes, which are expensive; more wait, but
    never longer than MOST_SECONDS."""
    RULE = read_rule("address 20 requests per second")
    MOST_SECONDS = 5

    def __init__(self, clock: Any):
        self.buckets = Buckets(clock)

    def seconds_to_turn(self, address: str) -> float:
        """Takes a turn; returns the seconds until it. Raises QuietEnd if too many wait, of which
        some may have left."""
        level = self.buckets.level_of(self.RULE, (self.RULE.text, ("address", address))).less(1)
        if level.wait > self.MOST_SECONDS:
            raise QuietEnd
        self.buckets.store([level])
        return level.wait


# PyPy begins to collect at eight times its nursery, which may be as large as the processor's cache.
# A step now and then takes a few milliseconds.
collect_a_little = getattr(gc, "collect_step", lambda: None)


BACKLOG = 1024  # connections that wait to be accepted


def listen(host: str, port: int) -> socket.socket:
    """Returns a socket that listens. HTTPServer would ask the DNS for our name here, and wait for
    it. Raises OSError."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        if host == "::":
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)  # IPv4, too
        # Elsewhere than on POSIX it would let two servers share a port.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, os.name == "posix")
        keep_alive(listener)
        listener.bind((host, port))
        listener.listen(BACKLOG)
        # Of several processes that are told of a connection one alone gets it.
        listener.setblocking(False)
        return listener
    except OSError:
        listener.close()
        raise


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    HANDED_OVER = 4         # new connections that wait for the loop while more are accepted
    UNSENT_BYTES = 65536    # bytes that Linux holds for a slow reader
    MAX_LINGERING = 128     # connections that are kept a moment, so that their last answer is read
    MAX_PER_ADDRESS = 256   # connections, where nothing else is set
    LOOKS = 8               # connections of which one is idle, when there are too many
    BODY_MEMORY = 256 << 20  # bytes of bodies of metered calls that are held at once
    BEAT_SECONDS = 1        # period of all that is shown second by second
    LOOK_SECONDS = 0.1      # between two looks of the accepting thread: at the loop, for the end
    tls: Optional[ssl.SSLContext] = None
    emptied: Optional[asyncio.Future] = None  # completed once no connection is open
    draining = False

    def __init__(self, proxy: Proxy, listener: socket.socket):
        """`listener` is a socket that listens."""
        self.proxy = proxy
        self.loop = proxy.loop
        self.pages = Pages(proxy)
        self.admin = Admin(proxy, self.pages.catalogue)
        config = proxy.config
        memory = MemoryBudget(max(self.BODY_MEMORY, 8 * config.max_body_bytes))
        origins = Origins(config.cors_origins, socket.gethostname())
        self.common = Common(
            config, proxy.clock, proxy.dialects, memory, Turns(self.loop), origins)
        self.reload()
        self.handshakes = Handshakes(proxy.clock)
        self.open = set()  # of ClientConnection
        self.by_address = Counter()  # how many are open of each
        self.lingering = OrderedDict()  # connections that only wait for their end, oldest first
        self.handing_over = threading.Semaphore(self.HANDED_OVER)
        self.loop_watch = LoopWatch(proxy)
        super().__init__(listener.getsockname(), ClientConnection, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        proxy.books.open()
        self.loop.call_soon_threadsafe(self.begin)

    def begin(self):
        """Begins what is done once in a while."""
        self.loop_watch.tick()
        self.sweep()
        self.beat()
        if self.proxy.redis:
            self.proxy.redis.start()

    # -- in the accepting thread

    def get_request(self):
        if self.proxy.tally:
            self.proxy.tally.let_others_first(len(self.open))
        try:
            return super().get_request()
        except OSError as failure:
            if failure.errno in OUT_OF_RESOURCES:
                time.sleep(0.1)  # accept would fail again at once, and again: a busy loop
            raise

    def process_request(self, request, client_address):
        """Hands a new connection to the loop, and waits for a busy loop: a burst of new ones must
        not starve it of the interpreter."""
        self.handing_over.acquire()
        soon(self.loop, self.start_connection, request, client_address[0])

    def service_actions(self):
        self.loop_watch.look()

    def handle_error(self, request, client_address):
        self.proxy.books.log.report()

    # -- on the loop

    def start_connection(self, request, peer):
        self.handing_over.release()
        # Whoever is on the link can have as many of its addresses as they like.
        address = "fe80::" if peer.startswith("fe80:") else address_of(peer)
        full = self.by_address[address] >= self.most_of(peer) or (
            len(self.open) >= self.proxy.config.max_connections and not self.end_an_idle_one())
        try:
            request.setblocking(False)
            request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if hasattr(socket, "TCP_NOTSENT_LOWAT"):  # what was taken was sent, or nearly
                request.setsockopt(
                    socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, self.UNSENT_BYTES)
            if self.tls:
                if full:  # to tell it so would take a handshake
                    return request.close()
                request = self.tls.wrap_socket(
                    request, server_side=True, do_handshake_on_connect=False)
        except (OSError, ValueError):  # gone before it began
            return request.close()
        connection = ClientConnection(self, request, peer, address)
        self.open.add(connection)
        self.by_address[address] += 1
        refusal = None
        if full:
            refusal = Overloaded(fields={"Retry-After": 1})
            self.let_go(connection)
        # The loop itself keeps only weak references to tasks.
        connection.task = self.loop.create_task(
            connection.converse(refusal), name=f"client {peer}")

    def end_an_idle_one(self):
        """Makes room: closes the connection that has been idle longest, of the address with most
        connections."""
        idle = [one for one in self.open if one.idle and one.context.is_waiting()]
        for oldest in heapq.nsmallest(self.LOOKS, idle, key=lambda one: (
                -self.by_address[one.address], one.context.since)):
            oldest.end_if_idle()
            if oldest.context.reason:
                self.release(oldest)
                return True
        return False

    def most_of(self, peer):
        """Returns how many connections an address may have; a trusted proxy speaks for many."""
        most = self.proxy.config.max_connections_per_address
        if self.proxy.callers.trusts(peer) or (not most and parse_ip(peer).is_loopback):
            return inf
        return most or self.MAX_PER_ADDRESS

    def let_go(self, connection):
        """Stops counting a connection, and keeps it for a moment."""
        self.release(connection)
        self.lingering[connection] = None
        if len(self.lingering) > self.MAX_LINGERING:
            oldest, _ = self.lingering.popitem(last=False)
            oldest.context.end(QuietEnd())

    def release(self, connection):
        if connection in self.open:
            self.open.remove(connection)
            self.by_address[connection.address] -= 1
            if not self.by_address[connection.address]:
                del self.by_address[connection.address]
            if not self.open and self.emptied:
                Stream.wake(self.emptied)

    def forget(self, connection):
        self.release(connection)
        self.lingering.pop(connection, None)

    def sweep(self):
        """Runs every Ledger.SAVE_SECONDS."""
        proxy = self.proxy
        self.sweep_timer = self.loop.call_later(Ledger.SAVE_SECONDS, self.sweep)
        proxy.routes.close_stale()
        collect_a_little()
        proxy.books.save(proxy.limits.buckets.snapshot(proxy.wall()))
        proxy.watchers.warnings.look(
            proxy.routes, proxy.books.ledger, proxy.callers.stored.keys.values())

    def beat(self):
        """Runs every second."""
        self.beat_timer = self.loop.call_later(self.BEAT_SECONDS, self.beat)
        self.common.begin_ids()
        self.admin.beat()
        for sharer in self.proxy.sharers:
            sharer.tell_soon()  # of slots that Redis forgets else
        tally = self.proxy.tally
        if tally:
            tally.open[tally.number] = len(self.open)
            tally.write(self.pages.count())

    def reload(self):
        """Reads the certificates again; open connections keep theirs. Raises OSError,
        ValueError."""
        config = self.proxy.config
        if config.tls_cert_file:
            self.tls = server_context(config.tls_cert_file, config.tls_key_file)

    # -- the end

    async def drain(self, seconds: float) -> int:
        """Stops accepting, closes idle connections, lets running calls finish for so many seconds,
        then cuts them; returns how many were cut."""
        await self.stop_accepting()
        self.draining = True
        self.proxy.watchers.feed.close(0)
        for connection in [*self.open, *self.lingering]:
            connection.end_if_idle()
        await self.emptying(seconds)
        cut = [connection for connection in self.open if not connection.idle]
        self.proxy.routes.close_queues()
        for connection in cut:
            connection.context.end(Stopped())
        await self.emptying(0.5)
        for connection in list(self.open):
            connection.client.close()  # it took nothing more
            connection.on_client_lost()
        await self.emptying(1)
        await self.part()
        if self.proxy.redis:
            await self.proxy.limits.buckets.drain(self.proxy.books.log.say)
            await self.proxy.redis.close()
        for timer in (self.loop_watch.timer, self.sweep_timer, self.beat_timer):
            timer.cancel()
        for pool in self.admin.pools():
            pool.shutdown(wait=False)
        return len(cut)

    async def part(self):
        """Leaves all upstreams."""
        self.proxy.routes.close_stale(everything=True)
        partings = set()
        for address in self.proxy.routes.addresses():
            partings |= address.partings
            address.helpers.shutdown(wait=False)
        for parting in partings:
            parting.cancel()
        if partings:
            await asyncio.wait(partings)

    async def stop_accepting(self):
        stopped = self.loop.create_future()

        def stop():
            self.shutdown()  # waits for the accepting thread, which may wait for the loop
            self.server_close()
            self.loop.call_soon_threadsafe(stopped.set_result, None)

        threading.Thread(target=stop, name="stop accepting", daemon=True).start()
        await stopped

    async def emptying(self, seconds):
        """Waits until no connection is open."""
        if self.open and seconds > 0:
            self.emptied = self.loop.create_future()
            with suppress(TimeoutError):
                await Context(self.loop).wait(self.emptied, seconds, "the end of running calls")


# --------------------------------------------------------------------------------------------------
# Workers: the parent of several processes on one port. It starts them, starts those again that die,
# and hands signals on. It has no thread, no loop and no open database, of which a fork would copy
# half, and does not know what its workers do.
# --------------------------------------------------------------------------------------------------

STOP_SIGNALS = "SIGTERM", "SIGINT"
ONE_SIGNAL_SECONDS = 0.5  # two signals within it are one


def catch_signals(names: Iterable[str], now: Callable[[], float]
                  ) -> Tuple[socket.socket, socket.socket]:
    """Returns a socket from which the numbers of these signals can be read, and its other end, to
    be kept. They come by way of the wake-up descriptor, which works on every system. A second one
    that says stop ends the process at once, even where something holds it; but `timeout` of GNU
    sends each to a process and then to its group."""
    receiver, sender = socket.socketpair()
    receiver.setblocking(False)
    sender.setblocking(False)
    stops = []

    def handle(number, _):
        if signal.Signals(number).name in STOP_SIGNALS:
            stops.append(now())
            if stops[-1] - stops[0] > ONE_SIGNAL_SECONDS:
                os._exit(1)

    signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    for name in names:
        if hasattr(signal, name):  # Windows knows two
            signal.signal(getattr(signal, name), handle)
    return receiver, sender


class Workers:
    """Keeps processes running, each of which does `work(number, lifeline, again)` and ends with the
    code that returns: the lifeline is a descriptor that ends with the parent, `again` tells that
    one of this number has died."""
    SETTLED_SECONDS = 5  # a worker that lived so long is started again at once,
    LEAST_SECONDS = 0.2  # another one after a pause that doubles each time,
    MOST_SECONDS = 30    # up to this
    SIGNALS = (*STOP_SIGNALS, "SIGHUP", "SIGUSR1", "SIGCHLD")
    stopping = False
    code = 0

    def __init__(self, count: int, work: Callable[[int, int, bool], int], clock: Any,
                 say: Callable[[str], None]):
        self.work = work
        self.clock = clock
        self.say = say
        self.running = {}  # process -> its number, when it began
        self.due = dict.fromkeys(range(count), -inf)  # number -> when it is to be started
        self.pauses = {}  # before that, of those that were started again

    def run(self, actions: Dict[str, Callable[[], None]]) -> int:
        """Returns the exit code once all have ended. `actions` are what the parent itself does when
        a signal comes, by its name, before that is handed on."""
        self.lifeline = os.pipe()
        self.signals = catch_signals(self.SIGNALS, self.clock.monotonic)
        while self.running or not self.stopping:
            self.start_due()
            pause = min(self.due.values(), default=inf) - self.clock.monotonic()
            select.select(self.signals[:1], [], [], None if pause == inf else max(0, pause))
            with suppress(BlockingIOError):
                for number in self.signals[0].recv(64):
                    self.forward_signal(signal.Signals(number), actions)
            self.reap()
        return self.code

    def forward_signal(self, number, actions):
        if number != signal.SIGCHLD:
            actions.get(number.name, lambda: None)()
            for process in self.running:
                os.kill(process, number)

    def stop(self):
        """Stops starting workers."""
        self.stopping = True
        self.due.clear()

    def start_due(self):
        now = self.clock.monotonic()
        for number in [number for number, due in self.due.items() if due <= now]:
            try:
                process = self.start(number)
                self.running[process] = number, now
                del self.due[number]
            except OSError as failure:
                self.due[number] = now + 1
                self.say(f"worker {number + 1} cannot be started: {failure}")

    def start(self, number):
        """Forks a worker; returns its process. Signals are blocked meanwhile: their handlers are
        not for a worker."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [
            getattr(signal, name) for name in self.SIGNALS])
        try:
            process = os.fork()
            if not process:
                self.be_worker(number, before)
            return process
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def be_worker(self, number, mask):
        """Does the work in a new process, and ends it."""
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            for name in self.SIGNALS:
                stops = name in (*STOP_SIGNALS, "SIGCHLD")
                signal.signal(getattr(signal, name), signal.SIG_DFL if stops else signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            for one in self.signals:
                one.close()
            os.close(self.lifeline[1])
            random.seed()
            code = self.work(number, self.lifeline[0], number in self.pauses)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def reap(self):
        """Collects the processes that have ended, and has them started again."""
        with suppress(ChildProcessError):
            while self.running:
                process, status = os.waitpid(-1, os.WNOHANG)
                if not process:
                    break
                number, began = self.running.pop(process)
                code = os.waitstatus_to_exitcode(status)
                if self.stopping:
                    self.code = max(self.code, code)
                elif code == 2 and number not in self.pauses:  # a fault that was there at the start
                    self.code = code
                    self.stop()
                    self.forward_signal(signal.SIGTERM, {})
                else:
                    self.start_again(number, began, code)

    def start_again(self, number, began, code):
        now = self.clock.monotonic()
        before = 0 if now - began >= self.SETTLED_SECONDS else self.pauses.get(number, 0)
        pause = min(2 * before, self.MOST_SECONDS)
        self.pauses[number] = max(pause, self.LEAST_SECONDS)
        self.due[number] = now + pause
        cause = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        self.say("worker %d has ended (%s): it is started again%s" % (
            number + 1, cause, f" in {pause:g} s" if pause else ""))


# --------------------------------------------------------------------------------------------------
# Demo: a small endpoint on loopback, for the first minute without a model. It stands in for a real
# one, on a loop of its own, and is no part of the proxy.
# --------------------------------------------------------------------------------------------------

class Demo:
    """Answers the proxy, on a port of loopback that the system picks. A last message that begins
    with "say: " comes back."""
    first_seconds = 0.0  # until an answer begins
    WORD_SECONDS = 0.05
    TEXT = ("This is the built-in demo endpoint of llm_proxy."
            " It answers every call with these words, one after another. ")
    MODELS = ('{"object": "list", "data": ['
              '{"id": "demo", "object": "model", "created": 0, "owned_by": "demo"}]}')
    FRAME = ('{"id": "demo-%d", "object": "%s", "created": %d, "model": "demo",'
             ' "choices": [%s], "usage": %s}')
    # When an event with a word was sent, in nanoseconds of the loop's time
    SENT = re.compile(b'"id": "demo-([0-9]{1,19})".+"content": "[^"]')
    USAGE = '{"prompt_tokens": %d, "completion_tokens": %d, "total_tokens": %d}'
    # names of an answer and of an event; the choice with the whole text, at the begin, of a word,
    # at the end
    CHAT = (
        "chat.completion", "chat.completion.chunk",
        '{"index": 0, "message": {"role": "assistant", "content": "%s"}, "finish_reason": "stop"}',
        '{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": null}',
        '{"index": 0, "delta": {"content": "%s"}, "finish_reason": null}',
        '{"index": 0, "delta": {}, "finish_reason": "stop"}')
    COMPLETION = (
        "text_completion", "text_completion",
        '{"index": 0, "text": "%s", "finish_reason": "stop"}',
        '{"index": 0, "text": "", "finish_reason": null}',
        '{"index": 0, "text": "%s", "finish_reason": null}',
        '{"index": 0, "text": "", "finish_reason": "stop"}')

    def __init__(self):
        self.listening = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.url = f"http://127.0.0.1:{self.listening.getsockname()[1]}/v1"

    async def serve(self):
        running = set()  # nobody else holds them: a collection of garbage would end them

        def begin(*streams):
            # Of a coroutine that is cancelled before it runs Python 3.11 complains; not of a task.
            task = asyncio.ensure_future(self.converse(*streams))
            running.add(task)
            task.add_done_callback(running.discard)

        async with await asyncio.start_server(begin, sock=self.listening) as server:
            await server.serve_forever()

    async def converse(self, reader, writer):
        """Answers one request after another, as simply as a proxy lets one."""
        # Who asks hangs up, or asks what no demo understands.
        with closing(writer), suppress(Exception):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                length = re.search(r"(?i)\ncontent-length: *([0-9]+)", head)
                body = await reader.readexactly(int(length[1]) if length else 0)
                method, target = head.split(" ")[:2]
                if method == "POST":
                    await self.answer_call(writer, body)
                elif target == "/v1/models":
                    self.answer(writer, self.MODELS)
                else:
                    self.answer(writer, "{}", "404 Not Found")

    async def answer_call(self, writer, body):
        call = json.loads(body or b"{}")
        name, event_name, whole, begin, piece, end = (
            self.CHAT if "messages" in call else self.COMPLETION)
        words = self.words_for(call)
        prompt = len(body) // 4
        usage = self.USAGE % (prompt, len(words), prompt + len(words))
        await asyncio.sleep(self.first_seconds)
        if not call.get("stream"):
            return self.answer(
                writer, self.frame(name, whole % "".join(words).rstrip(), usage))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
                     b"Transfer-Encoding: chunked\r\n\r\n")
        await asyncio.sleep(self.WORD_SECONDS * random.random())  # streams are not in one beat
        for choice in [begin, *[piece % word for word in words], end]:
            await self.tell(writer, self.frame(event_name, choice))
            await asyncio.sleep(self.WORD_SECONDS)
        if (call.get("stream_options") or {}).get("include_usage"):
            await self.tell(writer, self.frame(event_name, "", usage))
        await self.tell(writer, "[DONE]")
        writer.write(b"0\r\n\r\n")

    def words_for(self, call):
        """Returns what to say, word by word, as in strings of JSON."""
        said = call.get("prompt")
        if call.get("messages"):
            said = call["messages"][-1].get("content")
        if type(said) is list:
            said = "".join(str(dig(part, "text") or "") for part in said)
        text = said[5:] if str(said).startswith("say: ") else self.TEXT
        return [json.dumps(word)[1:-1] for word in re.findall(r"\s*\S+\s*", text)]

    def frame(self, name, choice, usage="null"):
        sent = asyncio.get_running_loop().time() * 1e9
        return self.FRAME % (sent, name, time.time(), choice, usage)

    @staticmethod
    async def tell(writer, data):
        event = b"data: %b\n\n" % data.encode()
        writer.write(b"%x\r\n%b\r\n" % (len(event), event))
        await writer.drain()

    @staticmethod
    def answer(writer, body, status="200 OK"):
        writer.write((
            f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n{body}").encode())


# --------------------------------------------------------------------------------------------------
# Bench: calls that are timed as a client sees them, to any URL, or, for the self-test, to a proxy
# of its own in front of the demo. It uses the parts by which the proxy calls upstreams.
# --------------------------------------------------------------------------------------------------

SHARES = {"min": 0, "p50": 50, "p90": 90, "p99": 99, "max": 100}


def in_milliseconds(seconds: Iterable[float]) -> Dict[str, float]:
    """Returns the mean and the percentiles of what is not empty."""
    times = sorted([round(1000 * one, 3) for one in seconds])
    return {"mean": round(sum(times) / len(times), 3), **{
        name: times[min(len(times) - 1, len(times) * share // 100)]
        for name, share in SHARES.items()}}


def upstream_at(url: str, key: Optional[str], environ: Texts) -> Upstream:
    """Returns what is at a URL, to be reached as the settings say, but with this key alone. Raises
    ConfigFaults."""
    config = read_config({**environ, "BASE_API_URL": url, "BASE_API_KEY": key or ""})
    return build_routes(config, time, lambda *news: None).base


class Bench:
    """Calls of one kind, some at once. `times` has seconds by what they are of: `upstream` is what
    the proxy told of it, `proxy` the rest of the time to the head of the answer, `event` the way
    of an event of the demo's. `statuses` has how often each came, or what went wrong instead."""
    began = ended = failures = 0
    leave_after = inf  # reads, as a caller who hangs up

    def __init__(self, upstream: Upstream, path: str, payload: JsonObject):
        lines = ["Content-Type: application/json", "Accept-Encoding: identity"]
        self.upstream = upstream
        self.head = partial(
            upstream.head, "POST", path, "", upstream.dialect, upstream.key, lines)
        self.body = json.dumps(payload).encode()
        self.streamed = payload.get("stream")
        self.statuses = Counter()
        self.times = {name: array.array("d") for name in (
            "whole", "upstream", "proxy", "first byte", "jitter", "event")}

    async def run(self, calls: Iterable[int], concurrency: int):
        """Makes a call for each of these."""
        loop, calls = asyncio.get_running_loop(), iter(calls)
        self.began = self.ended = loop.time()
        try:
            await asyncio.gather(*[self.work(loop, calls) for _ in range(concurrency)])
        finally:
            self.upstream.addresses[0].close_stale(everything=True)

    async def work(self, loop, calls):
        context = Context(loop)
        with closing(context):
            for _ in calls:
                try:
                    status = await self.call(context)
                    self.failures += status >= 400
                except Refusal as refusal:
                    status = refusal.cause or str(refusal)
                    self.failures += 1
                self.statuses[str(status)] += 1
                self.ended = loop.time()

    async def call(self, context):
        """Returns the status of one call. Raises Refusal."""
        began = context.loop.time()
        with await self.upstream.send_once("POST", self.head, self.body, context) as response:
            response.streamed = self.streamed
            answered = context.loop.time()
            arrivals = await self.read(response, context)
        self.times["whole"].append(context.loop.time() - began)
        start, stop = [
            response.head.get("x-upstream-request-" + name, "") for name in ("start", "stop")]
        if re.fullmatch("[0-9]{1,19} [0-9]{1,19}", f"{start} {stop}"):
            upstream = (int(stop) - int(start)) / 1e9
            self.times["upstream"].append(upstream)
            self.times["proxy"].append(answered - began - upstream)
        if self.streamed:
            self.times["first byte"].extend(at - began for at in arrivals[:1])
            # By how much each time between two of them differs from the one before
            self.times["jitter"].extend(
                abs(c - 2 * b + a) for a, b, c in zip(arrivals, arrivals[1:], arrivals[2:]))
        return response.status

    async def read(self, response, context):
        """Reads a body to its end; returns when something of it came, which of a stream is when an
        event did. Raises UpstreamFailed."""
        seconds = response.address.transport.read_timeout
        framing, arrivals, going_on = response.framing, [], True
        try:
            while going_on and not framing.ended and len(arrivals) < self.leave_after:
                payload = framing.feed(response.stream.take_all())[1]
                now = context.loop.time()
                arrivals += [now] * bool(payload)
                self.times["event"].extend(
                    now - int(sent) / 1e9 for sent in Demo.SENT.findall(payload))
                going_on = framing.ended or await response.more(context, now + seconds)
        except (OSError, Malformed) as failure:
            raise UpstreamFailed(failure) from None
        if not going_on and not framing.end_of_stream():
            raise UpstreamFailed("answer was cut")
        return arrivals

    def report(self) -> JsonObject:
        calls = sum(self.statuses.values())
        return {"requests": calls, "failures": self.failures,
                "seconds": round(self.ended - self.began, 3),
                "per_second": round(calls / max(1e-6, self.ended - self.began), 1),
                "statuses": dict(self.statuses),
                "milliseconds": {name: in_milliseconds(times)
                                 for name, times in self.times.items() if times}}


class SelfTest:
    """What a proxy of its own does on this machine, in front of the demo, told line by line."""
    CALL = {"model": "demo", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 20}
    STREAM = {**CALL, "stream": True}
    SETTINGS = {"HOST": "127.0.0.1", "METRICS": "open", "DRAIN_SECONDS": "1",
                "LIMITS": "each 1000000000 tokens per day"}
    START_TRIES, CALL_SECONDS, PAUSE = 100, 3, 1  # ten tries a second
    CALLERS, IDLE, STREAMS, HANG_UPS = 50, 500, {10: 5, 100: 10, 500: 50}, 50
    # Runs a file, which ends with its standard input: with this test, even where that is killed.
    PROGRAM = """\
import os, runpy, sys, threading
threading.Thread(target=lambda: os.read(0, 1) or os._exit(1), daemon=True).start()
runpy.run_path(sys.argv.pop(), run_name="__main__")"""
    all_good = True
    MEMORY = "process_resident_memory_bytes"
    OUTPUT = r'llm_proxy_tokens_total\{.*kind="output"\}'

    def __init__(self):
        self.demo = Demo()
        self.kept = socket.socket()
        # Linux lets the proxy, and nobody who asks for any port, listen at one that is kept so.
        self.kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.kept.bind(("127.0.0.1", 0))
        self.place = self.kept.getsockname()
        if sys.platform != "linux":
            self.kept.close()
        self.url = "http://%s:%d" % self.place
        self.key = new_secret()

    def tell(self, what, value, unit, limit):
        """Says what is good up to the limit; of calls, from there on."""
        good = value >= limit if what == "calls" else value <= limit
        self.all_good &= good
        print("%-46s %8.1f %-9s %s" % (what, value, unit, "good" if good else "POOR"), flush=True)

    def start(self, folder: str, environ: Texts) -> subprocess.Popen:
        """Starts the proxy, whose files are in this folder."""
        own = {name: text for name, text in environ.items() if not find_setting(name)}
        return subprocess.Popen(
            [sys.executable, "-c", self.PROGRAM, os.path.abspath(__file__)], cwd=folder,
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={
                **own, **self.SETTINGS, "BASE_API_URL": self.demo.url, "PORT": str(self.place[1]),
                "PROXY_API_KEYS": "selftest=" + self.key})

    def scrape(self, name):
        """Returns the sum of the proxy's metrics of a name. Raises OSError."""
        with closing(http.client.HTTPConnection(*self.place, timeout=5)) as asking:
            asking.request("GET", "/metrics")
            text = asking.getresponse().read().decode()
        return sum(map(float, re.findall(r"(?m)^%s(?:\{.*\})? (\S+)$" % name, text)))

    async def run(self, environ: Texts):
        """Raises OSError, and Refusal where a call fails."""
        asyncio.ensure_future(self.demo.serve())
        with self.kept, tempfile.TemporaryDirectory(prefix="llm_proxy") as folder:
            with self.start(folder, environ):
                await self.measure()

    async def measure(self):
        for _ in range(self.START_TRIES):
            await asyncio.sleep(0.1)
            with suppress(ConnectionRefusedError):
                self.scrape(self.MEMORY)
                break
        await self.timed(self.url, self.STREAM, range(self.CALLERS), self.CALLERS)
        before = self.scrape(self.MEMORY)
        with ExitStack() as idle:
            for _ in range(self.IDLE):
                idle.enter_context(socket.create_connection(self.place))
            await asyncio.sleep(self.PAUSE)
            more = self.scrape(self.MEMORY) - before
        self.tell("memory of an idle connection", more / self.IDLE / 1024, "KiB", 64)
        await self.measure_calls()
        for count, limit in self.STREAMS.items():
            await self.measure_streams(count, limit, before)
        await self.measure_hang_ups()

    async def timed(self, url, payload, calls, concurrency, leave_after=inf):
        """Returns the Bench of these calls. Raises Refusal where one fails."""
        bench = Bench(upstream_at(url, self.key, {}), "/v1/chat/completions", payload)
        bench.leave_after = leave_after
        await bench.run(calls, concurrency)
        if bench.failures:
            raise UpstreamFailed(f"calls failed: {dict(bench.statuses)}")
        return bench

    async def added_milliseconds(self, name, payload, calls, concurrency):
        """Returns how many milliseconds the proxy adds, by the medians of a time."""
        direct, proxied = [
            (await self.timed(url, payload, calls, concurrency)).report()["milliseconds"]
            for url in (self.demo.url, self.url)]
        return proxied[name]["p50"] - direct[name]["p50"]

    async def measure_calls(self):
        added = await self.added_milliseconds("whole", self.CALL, range(200), 1)
        self.tell("added to the first byte", added, "ms", 5)
        clock = asyncio.get_running_loop().time
        until = clock() + self.CALL_SECONDS
        calls = itertools.takewhile(lambda _: clock() < until, itertools.count())
        bench = await self.timed(self.url, self.CALL, calls, self.CALLERS)
        self.tell("calls", bench.report()["per_second"], "a second", 200)

    async def measure_streams(self, count, limit, before):
        """Measures so many streams in two rounds, as memory is not given back to the system at
        once."""
        added = await self.added_milliseconds("event", self.STREAM, range(2 * count), count)
        more = self.scrape(self.MEMORY) - before
        self.tell(f"added to an event, {count} streams", added, "ms", limit)
        if count == max(self.STREAMS):
            self.tell("memory of a running stream", more / count / 1024, "KiB", 256)

    async def measure_hang_ups(self):
        before = self.scrape(self.OUTPUT)
        bench = await self.timed(
            self.url, self.STREAM, range(self.HANG_UPS), self.HANG_UPS, leave_after=5)
        await asyncio.sleep(self.PAUSE)
        billed = self.scrape(self.OUTPUT) - before
        words = len(bench.times["event"])
        self.tell("delivered of what is billed after 50 hang-ups", 100 * words / max(1, billed),
                  "%", 100)


# --------------------------------------------------------------------------------------------------
# Commands: the command line. `main` comes last: it alone reads the environment and the clock.
# --------------------------------------------------------------------------------------------------

def tell_user(text):
    """Prints to stderr what is not the result of a command."""
    print(visible(str(text)), file=sys.stderr)


def describe_upstream(upstream):
    """Returns a line without secrets."""
    urls = " ".join(url.origin + url.path for url in upstream.url)
    key = {None: "not set", PASSTHROUGH: "of the caller"}.get(upstream.key, "set")
    models = "model as asked for" if upstream.name == "base" else "by its prefix alone"
    if upstream.model:
        models = "model " + upstream.model
    elif upstream.models:
        models = "models " + " ".join(upstream.models)
    if upstream.max_concurrency:
        models += f", calls at once: {upstream.max_concurrency}"
    return f"upstream {upstream.name} {urls}, key {key}, {models}"


def describe_limits(config):
    if config.limits:
        return "limits " + "; ".join(rule.text for rule in config.limits)
    cost = {
        "request": config.request_token_cost, "usage": "the tokens it used",
        "estimate": f"its estimated tokens, {config.response_token_reserve} for an answer without a"
                    " maximum"}[config.token_cost_mode]
    return (f"each caller's bucket holds {config.max_tokens} tokens and gains"
            f" {config.refill_tokens} every {config.refill_interval_seconds} s;"
            f" a call costs {cost}")


def describe_redaction(config):
    """Yields a line where something must not leave."""
    kinds = ", ".join([*(config.redact or ()), *(config.redact_patterns or ())])
    if kinds:
        yield "must not leave for %s: %s (%s)" % (
            ", ".join(sorted(config.redacted_upstreams())) or "nobody", kinds, config.redact_mode)


def greeting(config):
    """Returns what the proxy is about to do, line by line."""
    return [
        f"llm_proxy {VERSION} listens on {config.origin(config.host)}",
        *[f"{config.workers} workers share the port"] * (config.workers > 1),
        *map(describe_upstream, config.all_upstreams),
        describe_limits(config),
        *describe_redaction(config),
        *("warning: " + warning for warning in config.warnings())]


def settings_help():
    rows = ["settings, from the environment or from .env in the working directory:"]
    for group, settings in SETTINGS.items():
        rows += ["", group + ":"]
        for setting in settings:
            default = f" [{setting.default}]" if setting.default else ""
            rows.append(f"  {setting.name:<29} {setting.sentence}{default}")
    return "\n".join(rows)


async def list_models(upstream):
    """Returns the models that an upstream lists. Raises as `ask_models` does."""
    try:
        return await ask_models(asyncio.get_running_loop(), upstream, 10)
    finally:
        upstream.addresses[0].close_stale(everything=True)


def check(config):
    """Prints what would be used, and the models of each address; returns the exit code."""
    faults = list(faults_of_start(config))
    for name, text in config.texts_in_use():
        line = re.sub(r";?\s*\n\s*", "; ", text or "not set")
        print(f"{name:<29} {visible(line)}")
    for line in [*greeting(config)[1:], *["fault: " + fault for fault in faults]]:
        print(visible(line))
    code = int(bool(faults))
    for upstream in build_routes(config, time, lambda *row: None).all:
        upstream.model = None  # its own list is asked for
        for address in upstream.addresses[:]:
            upstream.addresses = [address]
            try:
                names = [in_ascii(model.name) for model in run_alone(list_models(upstream))]
                models = ", ".join(names) or "none that would be asked of it"
            except (Refusal, ValueError) as refusal:
                models = with_cause(refusal)
                code = 1
            print(f"models of {upstream.name} at {address.endpoint.origin}: {models}")
    return code


def faults_of_start(config):
    """Yields what would keep a start from using the database, the usage log, Redis or the port.
    Changes nothing, but notes whether keys are stored, and warns if only memory would be used."""
    try:
        if config.database != "off":
            look_at_database(config)
    except DatabaseFault as fault:
        if isinstance(fault, Unwritable) and config.texts["DATABASE"] == DEFAULT_DATABASE:
            print(IN_MEMORY % fault)
        else:
            yield str(fault)
    if config.usage_log not in (None, "-") and not can_be_written(config.usage_log):
        yield "USAGE_LOG must be a file that can be written"
    if config.redis_url:
        fault = run_alone(fault_of_redis(config))
        if fault:
            yield f"REDIS_URL: Redis {fault}"
    try:
        listen(config.host, config.port).close()
    except OSError as failure:
        yield cannot_listen(config, failure)


async def fault_of_redis(config):
    """Returns why Redis cannot be used, None where it can."""
    loop = asyncio.get_running_loop()
    redis = build_redis(config, loop)
    fault = loop.create_future()

    async def ask():
        await redis.ask_and_wait("PING")
        fault.set_result(None)

    redis.on_connect.append(ask)
    redis.on_leave.append(partial(Stream.wake, fault))
    redis.start()
    await asyncio.wait([fault], timeout=5)
    await redis.close()
    return fault.result() if fault.done() else "is silent"


def cannot_listen(config, failure):
    return "cannot listen on %s port %d: %s; choose another with HOST= or PORT=" % (
        config.host, config.port, failure.strerror or failure)


def can_be_written(path):
    """Tells whether a file can be written or made; tries the latter with another file in its
    folder."""
    if os.path.exists(path):
        return not os.path.isdir(path) and os.access(path, os.W_OK)
    folder = os.path.dirname(os.path.abspath(path))
    with suppress(OSError), tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        return bool(file.write(b" "))


def look_at_database(config):
    """Checks the database without changing it. Raises DatabaseFault if a service could not use
    it."""
    path = config.database
    database = database_to_read(config)
    if database:
        with suppress(sqlite3.Error), closing(database):
            if is_closed(database.execute):
                config.choose_defaults(True)
    if os.path.exists(lock_name(path)):
        with lock_for_service(path) or nullcontext():
            pass
    if not can_be_written(path):
        raise Unwritable(path, OSError("no such folder, permission or room"))


IN_MEMORY = "warning: calls and buckets are kept in memory only: %s"


def pin_to_cpu(cpu, port, worker=0):
    """Pins the process to one CPU, where the system can do that. -1: the port picks it, so that two
    proxies differ; workers take those that follow. One thread does nearly all the work, a tenth
    faster where it stays. Writer threads, which run already, are not pinned: they would hold it up
    when they have much to do."""
    if cpu is None or not CPUS:
        return
    number = CPUS[(port + worker) % len(CPUS)] if cpu < 0 else cpu + worker
    with suppress(OSError):
        os.sched_setaffinity(0, {number})


def tune_interpreter():
    """Tunes the garbage collector and the compiler. CPython looks for cycles less often: calls
    leave hardly any, but a look that comes too seldom takes long, and streams wait meanwhile. PyPy
    compiles what ran a few hundred times, and does not forget counts: by default what runs once a
    call was compiled late, or in parts."""
    if hasattr(gc, "freeze"):
        gc.freeze()
        gc.set_threshold(10_000, 20, 20)
    if "pypyjit" in sys.builtin_module_names:
        __import__("pypyjit").set_param(
            "decay=0,threshold=200,function_threshold=300,trace_eagerness=40")


def enlarge_nursery(environ: Texts):
    """Begins PyPy anew, which learns only at its start how much to allocate between two collections
    of what is young. By default that is less than what running calls hold."""
    if IS_PYPY and sys.platform == "linux" and "PYPY_GC_NURSERY" not in environ:
        with open("/proc/self/cmdline", "rb") as file:
            arguments = file.read().split(b"\0")[:-1]
        os.execve(sys.executable, arguments, {**environ, "PYPY_GC_NURSERY": "32M"})


def raise_descriptor_limit():
    """Takes what the system gives: a call needs two descriptors, and the usual limit is 1024."""
    # Windows has no such module, macOS a lower limit of its own
    with suppress(ImportError, OSError, ValueError):
        import resource
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


DEMO_HINT = (
    "try this until the limit is reached (add -H 'Authorization: Bearer KEY' where keys are asked"
    " for):\n"
    "  curl -N %s/v1/chat/completions -H 'Content-Type: application/json' \\\n"
    """    -d '{"model":"demo","max_tokens":1,"messages":[{"role":"user","content":"hello"}],"""
    """"stream":true}'""")


def database_to_read(config):
    """Returns the database to read, None without one. Raises DatabaseFault if its keys cannot be
    read, as anybody could call then."""
    try:
        return Database(config.database, reading=True)
    except NothingRecorded:
        return None
    except Unwritable as fault:
        if config.proxy_api_keys is None and os.path.isfile(config.database):
            raise DatabaseFault(f"{fault}: the keys in it cannot be read") from None


def open_database(config, remarks, shared=False):
    """Returns the database. Where only the default one cannot be written, `remarks` say so, and it
    is read, for its keys: nothing else is remembered. Raises DatabaseFault."""
    if config.database == "off":
        return None
    try:
        return open_for_service(config.database, open_patiently, shared)
    except Unwritable as fault:
        if config.texts["DATABASE"] != DEFAULT_DATABASE:
            raise
        remarks.append(IN_MEMORY % fault)
        return database_to_read(config)


def open_patiently(path, lock, shared=False):
    """Opens a database that another process may have locked; SQLite waits 5 seconds each time.
    Raises DatabaseFault."""
    for left in reversed(range(12)):
        try:
            return Database(path, lock, shared=shared)
        except InUse as fault:
            if not left:
                raise
            tell_user(f"{fault}, waiting")


def offer_dashboard(config, has_admin, path):
    """Returns where the page is. Where no admin's key is set or stored, one is made that ends with
    this process; it is told on a terminal, else written to a file beside that of the database,
    which its owner alone can read."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)
    page = "dashboard: %s/dashboard" % (config.public_url or config.origin(host))
    if config.admin_key or has_admin:
        return page
    key = place = new_secret()
    if not os.isatty(2):
        if path is None:
            return page + (" needs ADMIN_KEY to be set: there is no terminal to tell a new key on,"
                           " and no DATABASE to write it beside")
        path = config.admin_key_file = path + ".admin-key"
        place = "in " + os.path.abspath(path)
        try:
            write_secret(path, key)
        except OSError as failure:
            return f"{page} needs ADMIN_KEY to be set: {failure}"
    config.admin_key = key
    return f"{page} with the key {place}"


def write_secret(path, secret):
    """Writes a file anew. Raises OSError."""
    with suppress(FileNotFoundError):
        os.remove(path)
    # O_EXCL: not into what somebody else has put there meanwhile, nor through a link
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secret + "\n")


def run(config: Config, remarks: List[str]) -> int:
    """Serves until a signal says stop; returns the exit code. `remarks` are for the start of the
    log. Raises ConfigFaults and DatabaseFault."""
    raise_descriptor_limit()
    log_stream = open(2, "wb", buffering=0, closefd=False)
    say = partial(say_at_once, log_stream, config.log_format == "json")
    database = open_database(config, remarks)
    secret = file_secret(database)
    keys = keys_to_go_by(config, database, secret, lambda text: None)
    try:
        listener = listen(config.host, config.port)
    except OSError as failure:
        say(cannot_listen(config, failure))
        return 1
    page = offer_dashboard(config, keys.has_admin(time.time()), database and database.path)
    lines = [*greeting(config), *remarks, page]
    if config.workers > 1:
        common = Worker(listener, database and database.lock, secret, Tally(config.workers))
        if database:
            leave_to_workers(database)
        code = run_workers(config, log_stream, say, common, lines)
    else:
        server = Server(build(config, log_stream, database=database), listener)
        pin_to_cpu(config.cpu_affinity, config.port)
        code = run_loop(server, lines)
    with suppress(OSError):
        os.remove(config.admin_key_file)
    return code


def leave_to_workers(database):
    """Closes a database after its tables are made or upgraded: SQLite's connections must not be
    carried through a fork (https://www.sqlite.org/howtocorrupt.html, 2.6)."""
    database.connection.close()
    if database.lock:
        let_workers_in(database.lock)


def run_loop(server, lines, lifeline=None):
    """Serves until a signal says stop; returns the exit code."""
    proxy = server.proxy
    proxy.loop.run_until_complete(serve(server, lines, lifeline))
    proxy.books.close(5)
    if any(address.connecting for address in proxy.routes.addresses()):
        os._exit(0)  # a helper thread hangs in a look-up; the interpreter would wait for it
    return 0


def run_workers(config, log_stream, say, common, lines):
    """Serves by several processes, whose common Worker this is; returns the exit code."""
    def take_settings():  # for workers that are started from now on
        with suppress(ConfigFaults):
            config.take(config.reread())

    def stop():
        workers.stop()
        common.listener.close()

    def work(number, lifeline, again):
        return run_worker(config, log_stream, common._replace(
            number=number, lifeline=lifeline, again=again))

    for line in lines:
        say(line)
    workers = Workers(config.workers, work, time, say)
    return workers.run({"SIGTERM": stop, "SIGINT": stop,
                        "SIGHUP": stop if stops_when_hung_up(config) else take_settings})


def say_at_once(stream, as_json, text):
    """Writes a line to the log without a thread, if somebody reads it."""
    line = visible(message_line(text, as_json, time)) + "\n"
    with suppress(OSError):
        if select.select([], [stream], [], 0)[1]:
            stream.write(line.encode("ascii", "backslashreplace"))


def run_worker(config, log_stream, worker):
    """Serves as one of several processes; returns the exit code."""
    try:
        if worker.lock:
            database = open_patiently(config.database, worker.lock, shared=True)
        else:
            database = open_database(config, [], shared=True)
        proxy = build(config, log_stream, database=database, worker=worker)
        proxy.tally = worker.tally
        proxy.tally.begin(worker.number)
        if proxy.redis:
            proxy.limits.buckets.replaces_dead = worker.again
        server = Server(proxy, worker.listener)
        pin_to_cpu(config.cpu_affinity, config.port, worker.number)
    except (ConfigFaults, DatabaseFault) as fault:
        print(fault, file=sys.stderr, flush=True)  # it leaves by os._exit
        return 2
    return run_loop(server, ["it serves again"] * worker.again, worker.lifeline)


def reload(server: Server):
    """Applies changed settings, certificates and a new usage log, and says so."""
    proxy, say = server.proxy, server.proxy.books.log.say
    try:
        config = proxy.config.reread()
        server.reload()
        rest = rebuild(proxy, config)
        say("settings and certificates were read again; " + describe_limits(proxy.config))
        for name in rest:
            say(f"{name} was changed: it needs a new start")
        for warning in config.warnings():
            say("warning: " + warning)
    except (ConfigFaults, OSError, ValueError) as fault:
        say(f"settings and certificates were not read again, the old ones stay: {fault}")
    if proxy.books.usage_log:
        proxy.books.usage_log.reopen()


async def serve(server: Server, lines: Sequence[str], lifeline: Optional[int]):
    """Accepts until a signal says stop, or the parent of a worker ends, then drains. The `lines`
    are logged once signals are handled."""
    say, config = server.proxy.books.log.say, server.proxy.config
    stopping = server.loop.create_future()

    stop = partial(Stream.wake, stopping)
    handle_signals(server.loop, {
        "SIGTERM": stop, "SIGINT": stop, "SIGUSR1": partial(report_calls, server),
        "SIGHUP": stop if stops_when_hung_up(config) else partial(reload, server)})
    if lifeline is not None:
        watch_parent(server, lifeline, stop)
    for line in lines:
        say(line)
    threading.Thread(target=server.serve_forever, args=(server.LOOK_SECONDS,), name="accept",
                     daemon=True).start()
    probing = server.loop.create_task(probe(server), name="probe")
    await stopping
    probing.cancel()
    say(f"stopping: running calls have {config.drain_seconds:g} s")
    cut = await server.drain(config.drain_seconds)
    say(f"stopped, {cut} calls cut" if cut else "stopped")


def report_calls(server):
    """Logs the calls that are running."""
    calls = [repr(one) for one in server.open if one.reply and not one.idle]
    for line in [f"running calls: {len(calls)}", *calls]:
        server.proxy.books.log.say(line)


def watch_parent(server, lifeline, stop):
    """Makes a worker stop when its parent ends, at once if the parent did not wait for the
    drain."""
    def end():
        if server.draining:
            os._exit(1)
        server.loop.remove_reader(lifeline)
        stop()

    server.loop.add_reader(lifeline, end)


async def probe(server):
    """Logs which upstreams are not there at the start, while calls run already."""
    async def report_fault(address):
        with closing(Context(server.loop)) as context:
            fault = await address.probe(context)
        if fault:
            server.proxy.books.log.say(fault)

    await asyncio.gather(*map(report_fault, server.proxy.routes.addresses()))


def stops_when_hung_up(config):
    """Tells whether SIGHUP means that the terminal was closed; with TLS it means, even there, that
    certificates are new."""
    return os.isatty(0) and not config.tls_cert_file


def handle_signals(loop, actions):
    """Calls the action of each signal, by its name, on the loop."""
    def on_signals(_):
        for number in receiver.recv(64):
            actions[signal.Signals(number).name]()

    receiver, sender = catch_signals(actions, loop.time)
    loop.add_reader(receiver, on_signals, sender)  # both ends must stay referenced


GROUPS = (*SUM_KEYS, "outcome", "day")
FIND_CALL = "SELECT * FROM calls WHERE id = ? ORDER BY rowid DESC LIMIT 1"
USED = "calls input cached output reasoning estimated unpriced usd".split()


def read_option(name, read, text):
    """Returns the value of an option of the command line. Raises ConfigFaults."""
    try:
        return read(text)
    except ValueError as fault:
        raise ConfigFaults(f"{name} {fault} (got {shown_value(text)})") from None


def usage_query(execute, by, since):
    """Returns the statement that adds up what calls since then used: whole quarters from the sums,
    as far as there are any, the rest from the calls."""
    facts, sums, calls, whole = read_facts(execute), [], [], MOST
    if "summed" in facts and "outcome" not in by:
        whole = int(-(-since // QUARTER)) * QUARTER
        calls = [f"number > {facts['summed']} AND time >= {whole}"]
        counts = ", ".join("{0} * %s AS %s" % (name, name) for name in SUM_COUNTS)
        sums = [f"SELECT start, NULL AS outcome, {SUM_NAMES}, {counts.format(sign)} FROM sums"
                f" WHERE span = {span} AND start >= {low} AND start < {high}"
                for span, low, high, sign in read_parts(whole, MOST // DAY * DAY)]
    calls.append(f"time >= {since!r} AND time < {whole}")
    present = {row[1] for row in execute("PRAGMA table_info(calls)")}
    missing = "".join(f", NULL AS {name}" for name in ("team", "tag") if name not in present)
    columns = ", ".join(f"{value} AS {name}" for name, value in {**SUM_KEYS, **SUM_COUNTS}.items())
    all_of_it = " UNION ALL ".join([*sums, *[
        f"SELECT {START} AS start, outcome, {columns}"
        f" FROM (SELECT *, rowid AS number{missing} FROM calls) WHERE {where}"
        for where in calls]])
    names = ", ".join("date(start, 'unixepoch')" if name == "day" else name for name in by)
    return (f"SELECT {names}, {SUM_TOTALS} FROM ({all_of_it})"
            f" WHERE caller = coalesce(:caller, caller) GROUP BY {names} HAVING total(calls)")


def read_usage(path, options, now):
    """Returns the names of columns, and a row for each group, the most expensive first; with --id
    the one row of that call. Raises DatabaseFault."""
    since = max(0, now - read_option("--since", age, options.since))
    by = read_option("--by", listed(one_of(*GROUPS)), ",".join(options.by or ["caller"]))
    with closing(Database(path, reading=True).connection) as connection:
        execute = connection.execute
        if options.id:
            return COLUMN_NAMES, list(execute(FIND_CALL, (options.id,)))
        tell_of_boxes(execute)
        groups = [(row[:len(by)], Sum._make(row[len(by):])) for row in execute(
            usage_query(execute, by, since), {"caller": options.caller})]
    groups.sort(key=lambda group: (
        -group[1].picodollars, -group[1].calls, list(map(str, group[0]))))
    rows = [(names, one.as_dict()) for names, one in groups]
    return (*by, *USED), [(*names, *map(used.get, USED)) for names, used in rows]


def tell_of_boxes(execute):
    """Says that not only the calls of this box are added up, where that is so."""
    if not list(execute("SELECT 1 FROM sqlite_master WHERE name = 'facts'")):
        execute("CREATE TEMP TABLE facts (name, value)")  # a file of an older version has none yet
    (others,), = execute("SELECT count(*) FROM facts WHERE name LIKE 'heard of %'")
    if others:
        tell_user(f"other boxes whose sums are in it: {others}")


def print_table(names, rows):
    """Prints rows for people: words to the left, numbers to the right. What a terminal would take
    for a command is spelled out."""
    table = [names, *rows]
    columns = []
    for name, *values in zip(*table):
        width = max(len(in_ascii(str(value))) for value in [name, *values])
        is_text = name != "usd" and any(type(value) is str for value in values)
        columns.append("{:%s%d}" % ("<" if is_text else ">", width))
    for row in table:
        print("  ".join(columns).format(*[in_ascii(str(value)) for value in row]).rstrip())


def database_in(settings):
    """Returns the path of the database. Raises ConfigFaults."""
    path = settings.get("DATABASE", DEFAULT_DATABASE)
    if path == "off":
        raise ConfigFaults("calls and keys are kept in DATABASE, and that is off")
    return path


def usage_command(options, settings):
    """Prints who used what, from the ledger; returns the exit code. Raises ConfigFaults and
    DatabaseFault."""
    names, rows = read_usage(database_in(settings), options, time.time())
    if options.json:
        print(json.dumps([dict(zip(names, row)) for row in rows], indent=2))
    elif options.csv:
        print(csv_of(names, rows), end="")
    elif options.id and rows:
        fields = [(name, str(value)) for name, value in zip(names, rows[0]) if value is not None]
        print_table(("field", "value"), fields)
    elif rows:
        print_table(names, rows)
    else:
        print("no such call" if options.id else "no calls yet")
    return 0


PRICES_URL = "https://models.dev/api.json"
MAX_PRICES_BYTES = 64 << 20


def price_row(name, origin, price):
    """Returns a price in USD per million tokens; of what costs more above a number of tokens, or in
    a tier, input and output alone."""
    def usd(values):
        return " ".join(format_usd(value * 1_000_000) for value in values)

    above = price.above and "%d: %s" % (price.above_tokens, usd(price.above[:2]))
    tiers = ["%s %s" % (tier, usd(other[:1]) if isinstance(other, Price) else other)
             for tier, other in price.tiers.items()]
    return (name, origin, *usd(price[:5]).split(" "), above or "", " ".join(tiers))


def known_prices(own):
    """Returns rows of the operator's own prices, then of the built-in ones that still count."""
    known = Prices(own)
    return [price_row(name, "PRICES", price) for name, price in known.own.items()] + [
        price_row(name, "built in", price) for name, price in usual_prices().items()
        if known.find(name) is known.usual[known.fold(name)]]


def update_prices(path, url=PRICES_URL):
    """Fetches a list of prices into a file, which stays as it was if that fails. Raises
    ConfigFaults."""
    read_option("URL", web_address, url)
    part = path + ".part"
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "llm_proxy/" + VERSION})
        with urllib.request.urlopen(request, timeout=30) as response:
            data = response.read(MAX_PRICES_BYTES + 1)
        require(len(data) <= MAX_PRICES_BYTES, "is larger than prices would be")
        with open(part, "wb") as file:
            file.write(data)
        prices = price_file(part)
        require(prices, "holds no price")
        os.replace(part, path)
    except (OSError, ValueError, http.client.HTTPException) as failure:
        with suppress(OSError):
            os.remove(part)
        cause = in_ascii(str(failure))  # may quote what the other side said
        raise ConfigFaults(f"{path} was not updated from {url}: {cause}") from None
    print(f"{path} has {len(prices)} prices now; PRICES={path} uses them")


def prices_command(options, settings):
    """Shows the prices that are known, with those of PRICES, or updates a file of them; returns the
    exit code. Raises ConfigFaults."""
    if options.update:
        if len(options.update) > 2:
            raise ConfigFaults("--update takes a file and a URL at most")
        update_prices(*options.update)
        return 0
    own = read_option("PRICES", price_file, settings["PRICES"]) if "PRICES" in settings else None
    print_table(("model", "from", *Price._fields[:5], "above", "tiers"), known_prices(own))
    return 0


def version_line():
    """Returns which file this is, and what runs it."""
    with open(__file__, "rb") as file:
        digest = hashlib.sha256(file.read()).hexdigest()
    return "llm_proxy %s, sha256 %s, %s %s" % (
        VERSION, digest, sys.implementation.name, sys.version.split(" ")[0])


DEFAULT_PAYLOAD = '{"messages": [{"role": "user", "content": "hello"}], "max_tokens": 16}'


def bench_of(options, environ):
    """Returns the Bench, how many calls it is to make, and how many at once. Raises
    ConfigFaults."""
    read_option("URL", endpoints, options.url)
    upstream = upstream_at(options.url, options.key, environ)
    try:
        requests = read_option("--requests", number_between(1, 10_000_000), options.requests)
        concurrency = read_option(
            "--concurrency", number_between(1, 10_000), options.concurrency)
        payload = json.loads(options.payload or DEFAULT_PAYLOAD)
        require(type(payload) is dict, "the payload must be a JSON object")
        if options.model or "model" not in payload:
            payload["model"] = options.model or run_alone(list_models(upstream))[0].name
    except (Refusal, ValueError, IndexError) as fault:
        raise ConfigFaults("bench: " + with_cause(fault)) from None
    if options.stream:
        payload["stream"] = True
    return Bench(upstream, options.endpoint, payload), requests, concurrency


def run_unless_stopped(work):
    """Runs a coroutine; returns whether it came to its end, before a signal."""
    async def run():
        with suppress(NotImplementedError):  # Windows, where ^C is a KeyboardInterrupt
            for number in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(
                    number, asyncio.current_task().cancel)
        await work
        return True

    tune_interpreter()
    raise_descriptor_limit()
    with suppress(asyncio.CancelledError, KeyboardInterrupt):
        return run_alone(run())


async def run_bench(bench, requests, concurrency):
    async def tell_progress():
        while sys.stderr.isatty():
            print(f"{sum(bench.statuses.values())} of {requests} calls, {bench.failures} failed",
                  end="\r", file=sys.stderr)
            await asyncio.sleep(0.5)

    telling = asyncio.ensure_future(tell_progress())
    await bench.run(range(requests), concurrency)
    telling.cancel()


def bench_command(options, environ):
    """Times calls and prints how long they took, also where a signal stops it; returns the exit
    code. Raises ConfigFaults."""
    bench, requests, concurrency = bench_of(options, environ)
    run_unless_stopped(run_bench(bench, requests, concurrency))
    report = bench.report()
    if options.output == "json":
        print(json.dumps(report, indent=2))
    else:
        statuses, times = report.pop("statuses"), report.pop("milliseconds")
        print_table(report, [report.values()])
        print()
        print_table(("answered", "calls"), statuses.items())
        if times:
            print()
            print_table(("milliseconds", "mean", *SHARES),
                        [(name, *row.values()) for name, row in times.items()])
    return int(bool(bench.failures))


def selftest_command(_, environ):
    """Measures this machine; returns the exit code."""
    test = SelfTest()
    try:
        return int(not (run_unless_stopped(test.run(environ)) and test.all_good))
    except (Refusal, OSError) as fault:
        tell_user("selftest: " + with_cause(fault))
        return 1


KEY_ACTS = table_of("""
    add make a key, and print it, once
    list print all keys
    show print what is known of a key
    set change what a key may do; an empty text takes it away
    revoke let a key in no more, until it is restored
    restore let a revoked key in again
    rotate make another secret for a key, and print it, once; all else stays
    remove forget a key; the books keep what it used
    give let a caller's buckets of a unit hold more for a time, and add that
    reset fill a caller's buckets""")
FIELD_OPTIONS = [f"--{field.name} TEXT - {field.sentence}" for field in KEY_FIELDS.values()]
KEY_OPTIONS = {
    "add": FIELD_OPTIONS,
    "list": ["--json - - with all that is known"],
    "set": [*FIELD_OPTIONS, "--reset - - and fill its buckets"],
    "rotate": ["--grace 1h - how long the old secret is good still"],
    "give": ["amount AMOUNT - how much more, such as 2",
             f"unit {'|'.join(UNITS[:5])} - of what"]}
NOT_OF_KEYS = "act command run check demo json".split()
CLOSED = ("from now on nobody may call without a key that is stored, or in PROXY_API_KEYS"
          " (PROXY_API_KEYS=anyone lets all in)")


def keys_command(options, settings):
    """Does what `keys` is told; returns the exit code. Raises ConfigFaults and DatabaseFault."""
    path = database_in(settings)
    if not os.path.exists(path):
        tell_user(f"DATABASE {path} is made now: no proxy that runs has it")
    database = open_patiently(path, None)
    store = KeyStore(database.connection, time, Actor(user_name(), "admin", "command line"))
    given = {name: value for name, value in vars(options).items()
             if name not in NOT_OF_KEYS and value not in (None, False)}
    fields = dict(given)
    names = [fields.pop("name")] if options.act != "list" else []
    try:
        with closing(database):
            if options.act in ("give", "reset"):
                require_caller(store, options.name, settings)
            compare_with_settings(options, settings, database)
            show_keys(options, getattr(store, options.act)(*names, **fields), settings)
            if options.act not in ("list", "show"):
                tell_user(f"done: {options.act} {describe_fields(given)}")
    except KeyFault as fault:
        tell_user(fault)
        return 1
    except sqlite3.Error as failure:
        raise Unwritable(path, failure) from None
    return 0


def user_name():
    """Returns who gives the command: a name, or in a container a number."""
    try:
        return getpass.getuser()
    except (ImportError, LookupError, OSError):
        return f"uid {os.getuid()}"


def compare_with_settings(options, settings, database):
    """Warns of an unknown upstream. Raises KeyFault if a caller would be given more of a unit that
    no rule counts."""
    try:
        config = read_config(settings)
    except ConfigFaults:
        return  # the settings of the proxy are elsewhere
    names = [one.name for one in config.all_upstreams]
    if getattr(options, "upstream", None) not in (None, "", *names):
        tell_user(f"there is no upstream {ascii(options.upstream)}: calls by this key are refused")
    if options.act == "give":
        callers = Callers(config, b"", read_keys(database.key_rows(), b""))
        limits = build_limits(config, Buckets(time), {})
        require_bucket(limits, callers.named(options.name), options.unit)


def require_caller(store, name, settings):
    """Raises KeyFault if no known caller has this name, which may be misspelt."""
    with suppress(ValueError):
        if name in proxy_keys(settings.get("PROXY_API_KEYS", "anyone")).values():
            return
    with suppress(ValueError):
        return read_network(name)
    store.find(name)


def show_keys(options, result, settings):
    """Prints the result; of a new key the secret alone goes to stdout."""
    if isinstance(result, NewKey):
        print(result.secret)
        if result.closes and not settings.get("PROXY_API_KEYS"):
            tell_user(CLOSED)
    elif options.act == "show":
        print_table(("field", "value"), zip(result.as_dict(), readable(result)))
    elif options.act == "list":
        if options.json:
            print(json.dumps([key.as_dict() for key in result], indent=2))
        elif result:
            print_table(result[0].as_dict(), map(readable, result))
        else:
            print("no keys yet")


def readable(key):
    """Returns the values of a key as people read them."""
    values = {name: "yes" if value is True else value or "-"
              for name, value in key.as_dict().items()}
    for name in ("created", "expires", "last_used"):
        if values[name] != "-":
            values[name] = time.strftime("%Y-%m-%d %H:%M", time.localtime(values[name]))
    return [*values.values()]


# Panels of the dashboard for Grafana: title and unit, then lines of a legend and what is shown.
# `[5m]` becomes the interval of the graph; a histogram's name alone its percentiles.
PANELS = """\
Calls by outcome, reqps
{{outcome}}: sum by (outcome) (rate(llm_proxy_requests_total[5m]))

In flight and in line, short
{{upstream}}: sum by (upstream) (llm_proxy_in_flight)
{{upstream}}, in line: sum by (upstream) (llm_proxy_queue_length)

Tokens by model, cps
{{model}} {{kind}}: sum by (model, kind) (rate(llm_proxy_tokens_total[5m]))

Tokens by caller, the ten most, cps
{{caller}}: topk(10, sum by (caller) (rate(llm_proxy_tokens_total{kind=~"input|output"}[5m])))

Money by caller, per hour, currencyUSD
{{caller}}: topk(10, sum by (caller) (3600 * rate(llm_proxy_usd_total[5m])))

Money by model, per hour, currencyUSD
{{model}}: topk(10, sum by (model) (3600 * rate(llm_proxy_usd_total[5m])))

Time to the first byte, s
first_byte_seconds

Duration, s
request_duration_seconds

Time per output token, s
time_per_output_token_seconds

Wait in line, s
queue_wait_seconds

The proxy's own overhead, s
overhead_seconds

Buckets, share left, the ten emptiest, percentunit
{{caller}} {{rule}}: bottomk(10, llm_proxy_bucket_level / llm_proxy_bucket_capacity)

Refused by rule, reqps
{{rule}}: sum by (rule) (rate(llm_proxy_refused_total[5m]))

Addresses that are not well, short
{{upstream}} {{state}}: llm_proxy_upstream_state{state!="closed"}

Dropped, and the loop held, short
{{what}}: rate(llm_proxy_dropped_total[5m])
seconds held: rate(llm_proxy_loop_held_seconds_total[5m])

Memory, bytes
resident: process_resident_memory_bytes and on (job, instance) llm_proxy_build_info"""
PERCENTILE = "histogram_quantile(0.%d, sum by (le) (rate(llm_proxy_%s_bucket[5m])))"


# A dashboard without its panels, for any data source of Prometheus's kind
GRAFANA = json.loads("""{
    "title": "llm_proxy", "uid": "llm_proxy", "schemaVersion": 39, "editable": true,
    "refresh": "30s", "time": {"from": "now-6h", "to": "now"},
    "templating": {"list": [{"name": "source", "label": "Data source", "type": "datasource",
                             "query": "prometheus"}]}}""")


def grafana_panel(number, head, *rows):
    source = {"type": "prometheus", "uid": "${source}"}
    title, _, unit = head.rpartition(", ")
    if ": " not in rows[0]:
        rows = [f"p{share}: " + PERCENTILE % (share, rows[0]) for share in (50, 95, 99)]
    shown = [row.replace("5m", "$__rate_interval").partition(": ") for row in rows]
    return {
        "id": number + 1, "type": "timeseries", "title": title, "datasource": source,
        "gridPos": {"x": number % 2 * 12, "y": number // 2 * 8, "w": 12, "h": 8},
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "targets": [{"refId": letter, "datasource": source, "legendFormat": legend, "expr": query}
                    for letter, (legend, _, query) in zip("ABC", shown)]}


def grafana_command(*_):
    """Prints the JSON model of a dashboard."""
    panels = [grafana_panel(number, *panel.split("\n"))
              for number, panel in enumerate(PANELS.split("\n\n"))]
    print(json.dumps({**GRAFANA, "panels": panels}, indent=2))
    return 0


COMMANDS = {  # what runs them, a sentence, and rows of options, as `add_options` has them
    "usage": (usage_command, "print who used what, from DATABASE; see usage --help", f"""\
--by     day,model... - what to add up by, caller if it is not said: {", ".join(GROUPS)}
--since  7d       9999d only the last minutes (30m), hours (12h) or days (7d)
--caller NAME     -     only the calls of this caller
--id     REQUEST_ID - all that is known of one call
--json   -        -     print JSON
--csv    -        -     print CSV"""),
    "prices": (prices_command, "print the prices that are known, or update a file of them", f"""\
--update FILE... - fetch a list into FILE, from {PRICES_URL} or the URL that follows"""),
    "keys": (keys_command, "make, list and change keys in DATABASE; see keys --help", ""),
    "grafana": (grafana_command, "print a dashboard of /metrics, to import in Grafana", ""),
    "bench": (bench_command, "time calls to a URL; see bench --help", """\
--endpoint    PATH      /v1/chat/completions what to call there
--key         KEY       -    a key to call with
--model       NAME      -    the model to ask for; else the payload's, or the first listed
--payload     JSON      -    what to ask; else a short question
--requests    N         1000 how many calls
--concurrency N         50   how many at once
--stream      -         -    ask for streams
--output      text|json text what to print
url           URL       -    of the proxy or endpoint, with or without /v1"""),
    "selftest": (selftest_command, "tell what this machine can do, in half a minute", "")}


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(
        prog="llm_proxy.py", epilog=settings_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Let many people share an LLM endpoint fairly."
                    "  BASE_API_URL=http://127.0.0.1:8000/v1 python llm_proxy.py")
    parser.add_argument("--version", action="version", version=version_line())
    add_options(parser, [
        "--check - - print what would be used, ask the endpoint for its models, and exit",
        "--demo - - run in front of a small built-in endpoint"])
    add_commands(parser.add_subparsers(dest="command"))
    try:
        "".join(sys.argv if arguments is None else arguments).encode()
    except UnicodeEncodeError:
        parser.error("arguments must be UTF-8")
    return parser.parse_args(arguments)


def add_commands(commands):
    for name, (run, sentence, options) in COMMANDS.items():
        command = commands.add_parser(name, help=sentence)
        command.set_defaults(run=run)
        add_options(command, options.splitlines())
    acts = commands.choices["keys"].add_subparsers(
        dest="act", metavar="|".join(KEY_ACTS), required=True)
    for act, sentence in KEY_ACTS.items():
        name = ["name NAME - of the key, or caller"] * (act != "list")
        add_options(acts.add_parser(act, help=sentence, description=sentence),
                    name + KEY_OPTIONS.get(act, []))
    acts.choices["give"].add_argument("--for", dest="seconds", metavar="1d",
                                      help="how long; 1d if not said")


def add_options(parser, rows):
    """Adds options: rows of a flag or name, the name of its value or values ... or those it may
    have, - for none, its default, - for none, and a sentence."""
    for flag, value, default, meaning in [row.split(None, 3) for row in rows]:
        options = {"metavar": value}
        if value == "-":
            options = {"action": "store_true"}
        elif "|" in value:
            options = {"choices": value.split("|")}
        elif value.endswith("..."):
            options = {"metavar": value[:-3], "action": "extend", "nargs": "+"}
        if default != "-":
            options["default"] = default
            meaning += f" [{default}]"
        parser.add_argument(flag, help=meaning, **options)


def open_standard_files():
    """Opens closed standard files as /dev/null, or a connection would get the number of one."""
    number = 0
    while number < 3:
        number = os.open(os.devnull, os.O_RDWR)
    os.close(number)
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")
    sys.stdout.reconfigure(errors="backslashreplace")


def read_dotenv_file():
    """Raises ConfigFaults."""
    try:
        with open(".env", encoding="utf-8-sig") as file:
            return file.read()
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as failure:
        raise ConfigFaults(f".env must be a file of UTF-8 that can be read: {failure}") from None


def run_command(options, environ):
    """Does what the options say; returns the exit code. Raises ConfigFaults and DatabaseFault."""
    dotenv = read_dotenv_file()
    if options.command:
        return options.run(options, set_variables(environ, read_dotenv(dotenv)[0]))
    demo = Demo() if options.demo else None
    if demo:
        threading.Thread(
            target=asyncio.run, args=(demo.serve(),), name="demo", daemon=True).start()
        environ["BASE_API_URL"] = demo.url
        environ.setdefault("DATABASE", "off")  # so that every demo begins with full buckets
        environ["WORKERS"] = "1"  # the demo has threads, so no fork
    config = read_config(environ, dotenv)
    if options.check:
        return check(config)
    remarks = []
    if demo:
        demo.first_seconds = config.demo_first_ms / 1000
        remarks.append(DEMO_HINT % config.origin("127.0.0.1"))
    tune_interpreter()
    config.reread = lambda: read_config(environ, read_dotenv_file())
    return run(config, remarks)


def main(arguments: Optional[List[str]] = None) -> int:
    options = parse_arguments(arguments)
    open_standard_files()
    try:
        code = run_command(options, dict(os.environ))
        sys.stdout.flush()
        return code
    except (ConfigFaults, DatabaseFault) as fault:
        tell_user(fault)
        return 1 if isinstance(fault, (InUse, NothingRecorded)) else 2
    except OSError as failure:
        if failure.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what the interpreter has yet to flush
        if failure.errno == errno.ENOSPC:  # else the reader, such as head, has enough
            tell_user(failure.strerror)
        return 1


if __name__ == "__main__":
    enlarge_nursery(dict(os.environ))
    sys.exit(main())
