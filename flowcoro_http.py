"""flowcoro_http 0.1.0: HTTP/1.1, strictly and quickly: a codec without I/O, and a server and a client that stand on it.

To vendor, copy: flowcoro.py, flowcoro_net.py, flowcoro_schema.py, flowcoro_http.py

Example:

    import flowcoro
    from flowcoro_http import HttpServer

    app = HttpServer()

    @app.get("/users/{id:int}")
    async def user(request, id):
        return {"id": id, "greeting": f"Hello, {request.query.get('name', 'stranger')}"}

    async def main():
        async with app.test_client() as client:
            print((await client.get("/users/7?name=Ada")).json())

    flowcoro.run(main())        # app.run("127.0.0.1", 8000) instead serves it

Contents: constants · errors · headers · field values · cookies · forms · conditional requests and ranges · compression ·
codec · typed handlers · router · OpenAPI · messages · server · files · server-sent events · middleware ·
client · hosting: WSGI · hosting: ASGI

How it works:

The *codec*, HttpConnection, is one end of a connection, without its socket: bytes go in, and events come out; events go in, and
bytes come out. Who owns the socket reads, writes, and waits.

    receive_data(data), receive_end()   what the peer has sent
    next_event()                        RequestHead or ResponseHead (InformationalResponse before), Data …, EndOfMessage; then
                                        PAUSED until start_next_cycle(); ConnectionClosed; NEED_DATA while there is too little
    send(event), send_message(…)        the bytes of an event, or of a whole message as one

What the peer sends is taken as it is or refused with ProtocolError, whose status is the answer to give before closing. There is
no middle way: two programs that read one message differently are how requests are smuggled past a proxy. So a line ends with
CRLF, a length is plain digits, a message has one way to be framed; and what is sent is checked as well, so that no value given
to a header can split a response. The section "codec" says how it is made quick, and what holds however the bytes were split.

The sections before and after it are pure, too: what field values mean, how cookies, forms and ranges are read, who answers a
path. Time is an argument to them, and all are linear in their input.

The *server* is one task for each connection: it reads a head, asks the router, awaits the handler, writes the answer with one
system call, and goes on. Deadlines are kept by one sweep for all. What a handler does not ask for is not done: a body that
nobody reads is not received. What H1 to H4 say, in the section "server", holds whatever handlers and clients do.

The *client* keeps connections for each origin; one exchange has one, from the pool to the end of the response. Every wait has a
limit. K1 to K4, in the section "client", say when a connection is used again and what never leaves its origin.

Sections build on those before them. Whoever wants to read: codec, router, messages, server, in this order.

Errors:

    FlowCoroError
      HttpError                 a handler's, or ours: it is the answer
        ProtocolError           the peer's fault: what it has sent is no HTTP, or too much
        UnprocessableContent    422, with all that is wrong
      LocalProtocolError        our own fault: what is to be sent is no HTTP
      SignatureError            a signed value that is none
      RequestError              a client's: ConnectError (ProxyError), TransferError, RequestTimeout, ResponseError,
                                RedirectError, StatusError
    what a policy= raises comes out as it is: Rejected of flowcoro_resilience

Sources: RFC 9110 (semantics), RFC 9112 (HTTP/1.1), RFC 3986 (authorities), and those that the sections name; PEP 3333 (WSGI),
ASGI 3.0; h11 (the idea of two states and one table); CWE-444 and the papers of J. Kettle (HTTP desync attacks) for what servers
take that they should not.

What it does not do: HTTP/2; a cache; folded lines, bare LF and whatever else older servers let pass.

SPDX-License-Identifier: MIT
"""

import base64
import collections
import contextlib
import contextvars
import dataclasses
import datetime
import decimal
import errno
import functools
import hashlib
import hmac
import html
import http
import http.cookiejar
import inspect
import io
import ipaddress
import itertools
import json
import keyword
import math
import mimetypes
import netrc
import os
import queue
import random
import re
import secrets
import shutil
import signal
import socket
import ssl
import stat
import struct
import sys
import tempfile
import threading
import time
import types
import typing
import urllib.parse
import uuid
import weakref
import zlib

import flowcoro
import flowcoro_net
import flowcoro_schema

__version__ = "0.1.0"

__all__ = ["HttpServer", "HttpListener", "Request", "Response", "Fields", "FormFile", "Part", "Router", "Route", "Match",
           "HttpError", "UnprocessableContent", "openapi", "openapi_page", "HttpConnection", "RequestHead",
           "ResponseHead", "InformationalResponse", "Data", "EndOfMessage", "ConnectionClosed", "NEED_DATA", "PAUSED",
           "Headers", "ProtocolError", "LocalProtocolError", "MediaType", "parse_media_type", "negotiate_type",
           "negotiate_encoding", "negotiate_language", "http_date", "parse_http_date", "entity_tag", "safe_filename",
           "content_disposition", "parse_links", "cache_control", "TrustedProxies", "Forwarding", "Signer", "SignatureError",
           "send_file", "static_files", "ServerSentEvent", "event_stream", "last_event_id", "access_log", "cors",
           "compress", "etag", "security_headers", "body_limit", "timeout", "rate_limit", "concurrency_limit",
           "trusted_proxies", "request_id", "basic_auth", "bearer_auth", "sessions", "wsgi_app", "asgi_app", "HttpClient",
           "ClientRequest", "ClientResponse", "Timeouts", "Retries", "Auth", "BasicAuth", "BearerAuth", "DigestAuth",
           "EventStream", "RequestError", "ConnectError", "ProxyError", "TransferError", "RequestTimeout", "ResponseError",
           "RedirectError", "StatusError"]

# ---- constants ------------------------------------------------------------------------------------------------

# Bytes of a request line (or status line) at most, without its CRLF; beyond it 414. RFC 9112 section 3 asks for 8000 at least;
# nginx and Apache have 8 KiB.
MAX_REQUEST_LINE = 8 * 2**10

# Bytes of a field line at most, field lines at most, and bytes of a head (or trailer section) at most; beyond them 431.
# A line: Apache and nginx 8 KiB, but Kerberos tickets and cookies of 4 KiB each need more. Lines: Apache 100. A head: nginx
# 32 KiB, Node 16 KiB, Go 1 MiB.
MAX_FIELD_LINE, MAX_FIELDS, MAX_HEAD = 16 * 2**10, 100, 64 * 2**10

# Bytes of the line that begins a chunk at most: 16 digits, and extensions, which nobody uses but those who count on their
# being skipped. Go 4 KiB; per chunk that would be 4 KiB of nothing for each byte of content.
MAX_CHUNK_LINE = 256

# Lines that are remembered with what their check has found, and characters of each at most: half a megabyte for each of the
# two tables of field lines, four for request lines with their queries, of KNOWN_QUERY fields at most. When a table is full it is
# emptied: whoever fills it with lines of his own costs the others one check per 1024 lines.
KNOWN_LINES, KNOWN_LINE, KNOWN_QUERY = 1024, 256, 16

# The same for heads of answers: a quarter of a megabyte.
KNOWN_HEADS, KNOWN_HEAD = 256, 1024

# Bytes of field lines at most that a server's connection keeps while it is busy (a browser's are 0.5 to 3 KiB, by the cookies).
# Heads in a row that are unlike the one before, after which it keeps none (it is a proxy's, and each is another client's); and
# how many there have to be until it tries again: what is kept for nothing costs 1 to 2 µs.
KNOWN_FIELDS, MAX_UNLIKE, RETRY_UNLIKE = 4 * 2**10, 10, 1000

# ---- errors ---------------------------------------------------------------------------------------------------

class HttpError(flowcoro.FlowCoroError):
    """A request is answered with an error: `status`, `message` (for the client), `headers` of the answer."""

    def __init__(self, status, message="", headers=()):
        super().__init__(status, message)
        self.status, self.message, self.headers = status, message, headers

    def __str__(self):
        return f"{self.status}: {self.message}"


class ProtocolError(HttpError):
    """The peer has sent what is no HTTP, or more of it than a limit. `status` is what a server answers before it closes.

    400 no HTTP · 413 content too large · 414 request line too long · 431 head too large · 505 another major version; on the
    client's side it is 502, which a gateway may pass on.
    """


class LocalProtocolError(flowcoro.FlowCoroError):
    """Our own side asks for what is no HTTP: events in a wrong order, content beyond its length, a field that splits the head."""


# ---- headers --------------------------------------------------------------------------------------------------
#
# A field line is checked once, by a pattern over the whole of it, and then known: requests repeat their lines from one to the
# next (a browser's: all but a few), so a table of lines that have been found good (line -> what it says) saves the pattern, the
# splitting and the strings. On CPython 3.11 the lines of a browser's head (12, one of them a cookie) take 1.8 µs by it, 6.9 µs
# without. Only good lines get in; limits are not part of it, because they differ from connection to connection; secrets are
# not kept there.

_TOKEN_CHARS = r"!#$%&'*+\-.^_`|~0-9A-Za-z"
_VALUE_CHARS = r"\t\x20-\x7e\x80-\xff"
_is_token = re.compile(rf"[{_TOKEN_CHARS}]+").fullmatch
_is_text = re.compile(rf"[{_VALUE_CHARS}]*").fullmatch

# What follows the colon is stripped afterwards: two runs of whitespace in the pattern, with nothing between, would take the
# square of their length to fail.
_FIELD_LINE = re.compile(rf"([{_TOKEN_CHARS}]+):([{_VALUE_CHARS}]*)")
_is_digits = re.compile(r"[0-9]{1,18}").fullmatch

# RFC 9110 allows sub-delims and percent-encoding in a reg-name too. No host has them, and what reads a Host further on (a
# cache's key, a log, a template, a shell) is better off without.
_AUTHORITY = re.compile(r"([0-9A-Za-z._~-]+|\[[0-9A-Fa-f:.]+\])(?::([0-9]{1,5}))?")

# Field lines with such names (in lower case) are checked each time, not remembered, and not shown.
_is_secret = re.compile("auth|cookie|credential|key|passw|secret|session|signature|token").search


def _shown(text, most=60):
    """`text` for a message: quoted, and cut."""
    return repr(text) if len(text) <= most else f"{text[:most]!r}… ({len(text)} characters)"


def _authority_problem(text):
    """None if it is a host and perhaps a port (RFC 3986, narrowed), or what is wrong."""
    found = _AUTHORITY.fullmatch(text)
    if found is None:
        return "is no host with an optional port"
    if found[2] and int(found[2]) > 65535:
        return "has a port beyond 65535"
    if text[0] == "[":
        try:
            socket.inet_pton(socket.AF_INET6, found[1][1:-1])
        except OSError:
            return "is no IPv6 address"
    return None


def _length_problem(text):
    return None if _is_digits(text) else "is not 1 to 18 digits"


def _coding_problem(text):
    return None if text.lower() == "chunked" else "is not exactly `chunked`"


def _options_problem(text):
    """RFC 9110 5.6.1: a list of tokens; empty elements are allowed to those who read it."""
    return None if all(map(_is_token, _split_list(text))) else "is no list of tokens"


def _split_list(text):
    """The elements of a comma-separated list in which nothing is quoted; empty ones are left out. -> [str]"""
    return [element for element in [element.strip(" \t") for element in text.split(",")] if element]


# What the value of these has to be. They say where a message begins and ends, so they are never merely passed on.
_PROBLEMS = {"host": _authority_problem, "content-length": _length_problem, "transfer-encoding": _coding_problem,
             "connection": _options_problem}

# Which of them may not be repeated, not even with the same value: what reads them further on may take the first or the last.
_ONCE = ("host", "content-length", "transfer-encoding")

# RFC 9110 6.5.1: what a trailer section must not have, because it would change what has been done by then: framing, routing,
# modifiers of the request, authentication, control of the response, how the content is to be read.
_NOT_IN_TRAILERS = frozenset("""
    transfer-encoding content-length host connection keep-alive proxy-connection te trailer upgrade max-forwards expect range
    if-match if-none-match if-modified-since if-unmodified-since if-range pragma cache-control
    authorization proxy-authorization www-authenticate proxy-authenticate authentication-info proxy-authentication-info
    cookie set-cookie age expires date location retry-after vary warning
    content-encoding content-type content-range content-location content-language forwarded x-forwarded-for x-forwarded-proto
    x-forwarded-host via""".split())


class _Known(dict):
    """{text: what it says}: what `check` says of a text is kept, within KNOWN_LINES and KNOWN_LINE."""

    __slots__ = ("check",)

    def __init__(self, check):
        super().__init__()
        self.check = check

    def __missing__(self, text):
        value = self.check(text)
        if len(text) <= KNOWN_LINE:
            if len(self) >= KNOWN_LINES:
                self.clear()
            self[text] = value
        return value


def _known(check):
    """`check`, a function of a str, that remembers; without a frame for what is known."""
    return _Known(check).__getitem__


class _KnownLines(_Known):
    """{line: what it says, a tuple that begins with the lower-case name}. A line that is not known is checked by `check`."""

    __slots__ = ()

    def __missing__(self, line):
        entry = self.check(line)
        if (len(line) if isinstance(line, str) else len(line[0]) + len(line[1])) <= KNOWN_LINE and not _is_secret(entry[0]):
            if len(self) >= KNOWN_LINES:
                self.clear()
            self[line] = entry
        return entry


def _read_line(line):
    """A field line as received, without CRLF: (lower-case name, (name, value)). ProtocolError 400."""
    found = _FIELD_LINE.fullmatch(line)
    if found is None:
        raise ProtocolError(400, _line_problem(line))
    name, value = found[1], found[2].strip(" \t")
    lower = name.lower()
    problem = _PROBLEMS.get(lower)
    if problem is not None and (said := problem(value)):
        raise ProtocolError(400, f"{name}: {_shown(value)} {said}")
    return lower, (name, value)


def _line_problem(line):
    name, colon, _ = line.partition(":")
    if line[0] in " \t":
        return f"{_shown(line)}: a field line begins with whitespace (obsolete folding is not HTTP any more)"
    if not colon:
        return f"{_shown(line)}: a field line has no colon"
    if _is_token(name):
        return f"the value of {_shown(name)} has a control character"
    if _is_token(name.rstrip(" \t")):
        return f"{_shown(line)}: there is whitespace before the colon"
    return f"{_shown(name)} is no name of a field"


def _write_line(pair):
    """A (name, value) to be sent: (lower-case name, b"name: value CRLF"). LocalProtocolError, TypeError."""
    name, value = pair if not isinstance(pair, str) else (pair, None)       # one of a dict's names, whose letters would do
    if not isinstance(name, str) or not isinstance(value, str):
        raise TypeError(f"{pair!r}: name and value of a field are str")
    if not _is_token(name):
        raise LocalProtocolError(f"{_shown(name)} is no name of a field: letters, digits and !#$%&'*+-.^_`|~ are allowed")
    if not _is_text(value):
        shown = "its value" if _is_secret(name.lower()) else _shown(value)
        raise LocalProtocolError(f"{name}: {shown} has a control character or one beyond U+00FF; encode it")
    lower, value = name.lower(), value.strip(" \t")
    problem = _PROBLEMS.get(lower)
    if problem is not None and (said := problem(value)):
        raise LocalProtocolError(f"{name}: {_shown(value)} {said}")
    return lower, f"{name}: {value}\r\n".encode("latin-1")


_RECEIVED, _SENT = _KnownLines(_read_line), _KnownLines(_write_line)
_received, _sent = _RECEIVED.__getitem__, _SENT.__getitem__         # which call __missing__(), and cost no frame if not


def _first_of_each(entries):
    """{lower-case name: rest of its first entry}"""
    index = dict(entries)
    return index if len(index) == len(entries) else dict(reversed(entries))


class Headers:
    """The field lines of a head or trailer section: any number of each name, in order; names in any case (RFC 9110 5).

    Made from (name, value) pairs of str, or a dict. Names are tokens, values have no control character but HTAB and nothing
    beyond U+00FF (they travel as latin-1), SP and HTAB around them fall away; else LocalProtocolError, or TypeError for what is
    no str.
    Iterating gives all (name, value), spelt as received or set; len() counts lines.
    """

    __slots__ = ("_entries", "_index")

    def __init__(self, pairs=()):
        if hasattr(pairs, "items"):
            pairs = pairs.items()
        self._entries = [_entry(name, value) for name, value in pairs]     # (lower-case name, (name, value))
        self._index = None                                                 # made of them when it is first needed

    @classmethod
    def _of(cls, entries, index=None):
        self = cls.__new__(cls)
        self._entries, self._index = entries, index
        return self

    def _find(self, name):
        index = self._index
        if index is None:
            index = self._index = _first_of_each(self._entries)
        found = index.get(name)
        return index.get(_lower(name)) if found is None else found

    def __getitem__(self, name):
        """The first value of that name; KeyError if there is none."""
        found = self._find(name)
        if found is None:
            raise KeyError(name)
        return found[1]

    def get(self, name, default=None):
        """The first value of that name, or `default`."""
        found = self._find(name)
        return default if found is None else found[1]

    def get_all(self, name):
        """All values of that name, in order: a list, perhaps an empty one."""
        lower = _lower(name)
        return [pair[1] for other, pair in self._entries if other == lower]

    def _combined(self, name):
        """All values of that name as one list (RFC 9110 5.3); "" if there are none."""
        return ", ".join(self.get_all(name))

    def items(self):
        """All (name, value) in order, a new list."""
        return [entry[1] for entry in self._entries]

    def __iter__(self):
        return iter(self.items())

    def __contains__(self, name):
        return self._find(name) is not None

    def __len__(self):
        return len(self._entries)

    def __eq__(self, other):
        if not isinstance(other, Headers):
            return NotImplemented
        return ([(lower, pair[1]) for lower, pair in self._entries] == [(lower, pair[1]) for lower, pair in other._entries])

    __hash__ = None

    def add(self, name, value):
        """One more line, after the others."""
        if type(self._entries) is tuple:                # of a request that is known
            self._entries = list(self._entries)
        self._entries.append(_entry(name, value))
        self._index = None

    def set(self, name, value):
        """The only line of that name: in the place of the first, if there was one, or the last."""
        entry = _entry(name, value)
        place = next((n for n, (lower, _) in enumerate(self._entries) if lower == entry[0]), len(self._entries))
        self._entries = [other for other in self._entries if other[0] != entry[0]]
        self._entries.insert(place, entry)
        self._index = None

    def remove(self, name):
        """Take all lines of that name out; whether there were any."""
        lower, before = _lower(name), len(self._entries)
        self._entries = [entry for entry in self._entries if entry[0] != lower]
        self._index = None
        return len(self._entries) < before

    def copy(self):
        """Another one with the same lines."""
        return Headers._of(list(self._entries))

    def __repr__(self):
        shown = [(name, "…" if _is_secret(lower) else value) for lower, (name, value) in self._entries]
        return f"Headers({shown!r})"


def _entry(name, value):
    lower, _ = _SENT[name, value]
    return lower, (name, value.strip(" \t"))


def _lower(name):
    """The lower-case form of a name to look for. (Beyond ASCII lower() makes letters of what is none: U+212A is a k.)"""
    return name.lower() if name.isascii() else name


# ---- field values ---------------------------------------------------------------------------------------------
# After RFC 9110 sections 5.6 (lists, tokens, quoted strings, parameters, dates), 8 (media types, entity tags), 11
# (authentication) and 12 (negotiation); RFC 8187 (extended parameters), 6266 (Content-Disposition), 8288 (Link), 7617, 6750 and
# 7616 (basic, bearer, digest), 7239 (Forwarded), 9111 (Cache-Control), 6797 (Strict-Transport-Security).
#
# Each reader is a compiled pattern that is matched at one place after the other and never goes back: `++` and `*+` keep what they
# have matched, so a value that does not fit costs no more than one that does. What they repeat has no choice inside (`a|b` or
# `c*`): Python 3.11.4 gets that wrong. int(), lower() and decode() see only what a pattern has let through: by themselves they
# take "1_0", " 1" and the digits of all scripts.

# Seconds beyond which a delta-seconds counts as this many (RFC 9111 section 1.2.2): 68 years.
MAX_DELTA = 2**31

# Characters of an Accept… value up to which the choice is remembered, and choices remembered: browsers send about 130.
REMEMBERED_LENGTH, REMEMBERED = 256, 256

# Characters of a language tag; longer ones in an Accept-Language are passed over. RFC 5646 section 4.4.1 says 35 will do.
MAX_LANGUAGE = 64

# Characters of a file name in a Content-Disposition, so that one value cannot fill a head: file systems allow 255 bytes.
MAX_FILENAME = 255

_TOKEN_PATTERN = rf"[{_TOKEN_CHARS}]++"
_QDTEXT = r"\t \x21\x23-\x5b\x5d-\x7e\x80-\xff"
_QUOTED = rf'"[{_QDTEXT}]*+(?:\\[\t\x20-\x7e\x80-\xff][{_QDTEXT}]*+)*+"'
_OWS = r"[ \t]*+"

_element_at = re.compile(rf'[^",]*+(?:{_QUOTED}[^",]*+)*+').match
_quoted_pair = re.compile(r"\\(.)", re.DOTALL)
_parameter_at = re.compile(rf"{_OWS};{_OWS}(?:({_TOKEN_PATTERN})=(?:({_TOKEN_PATTERN})|({_QUOTED})))?").match
_ATTR_CHARS = r"[!#$&+\-.^_`|~0-9A-Za-z]*+"
_is_extended = re.compile(
    rf"(?i:(utf-8)|(iso-8859-1))'[0-9A-Za-z-]*+'({_ATTR_CHARS}(?:%[0-9A-Fa-f]{{2}}{_ATTR_CHARS})*+)").fullmatch
_is_weight = re.compile(r"(?:0(?:\.([0-9]{0,3}))?|(1)(?:\.0{0,3})?)").fullmatch


def _refused(what, value, why, status=400):
    """The error for a value that the peer has sent."""
    return ProtocolError(status, f"{what} {value!r:.80}: {why}")


def _parse_list(value):
    """The elements of a comma-separated list, without the whitespace around them; empty ones are left out. -> [str]

    A comma inside a quoted string separates nothing. ProtocolError if a quoted string has no end. RFC 9110 section 5.6.1.
    """
    if '"' not in value:
        return _split_list(value)
    elements, at = [], 0
    while at <= len(value):
        found = _element_at(value, at)
        if element := found[0].strip(" \t"):
            elements.append(element)
        at = found.end() + 1
        if at <= len(value) and value[at - 1] != ",":
            raise _refused("list", value, f"the quoted string at character {at} has no end, or holds a control character")
    return elements


def _parse_tokens(value):
    """A comma-separated list of tokens in lower case, as in Connection, Vary or Transfer-Encoding. -> [str]

    ProtocolError if one is no token.
    """
    tokens = _parse_list(value)
    for token in tokens:
        if not _is_token(token):
            raise _refused("list of tokens", value, f"{token!r:.40} is no token")
    return [token.lower() for token in tokens]


def _quote(text):
    """`text` as a quoted string. ValueError if it has characters that none can have: controls, or beyond U+00FF."""
    if not _is_text(text):
        raise ValueError(f"{text!r:.80} has a character that a quoted string cannot have: a control, or one beyond U+00FF")
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _unquoted(text):
    """The text of a quoted string that has been checked."""
    text = text[1:-1]
    return _quoted_pair.sub(r"\1", text) if "\\" in text else text


def _token_or_quoted(text):
    return text if _is_token(text) else _quote(text)


def _extended(text):
    """The text of an ext-value (RFC 8187), or None if it is none: it is then as if it had not been sent."""
    found = _is_extended(text)
    if not found:
        return None
    try:
        return urllib.parse.unquote_to_bytes(found[3]).decode("utf-8" if found[1] else "latin-1")
    except UnicodeDecodeError:
        return None


def _parameters(value, at, what):
    """{name in lower case: text} of the `; name=value` from `at` to the end of `value`.

    ProtocolError if one is malformed, or comes twice: whoever reads the other one may be deceived.
    """
    parameters = {}
    while at < len(value):
        found = _parameter_at(value, at)
        if not found:
            raise _refused(what, value, f"expected `; name=value` at character {at + 1}")
        at = found.end()
        name, token, quoted = found.groups()
        if name is None:                    # `;;` and `; ` at the end are allowed
            continue
        name = name.lower()
        if name in parameters:
            raise _refused(what, value, f"parameter {name} comes twice")
        parameters[name] = token if token is not None else _unquoted(quoted)
    return parameters


# -- media types

_media_type_at = re.compile(rf"({_TOKEN_PATTERN})/({_TOKEN_PATTERN})").match

# charset= of a peer is looked up here and nowhere else: codecs.lookup() would import modules and keep every name it is asked for,
# and some of its codecs are no character sets (idna, unicode_escape) or take quadratic time. The IANA's names and usual aliases.
_CHARSETS = {
    "utf-8": "utf-8", "utf8": "utf-8", "us-ascii": "ascii", "ascii": "ascii", "utf-16": "utf-16", "utf-16le": "utf-16-le",
    "utf-16be": "utf-16-be", "utf-32": "utf-32", "latin1": "latin-1", "latin-1": "latin-1", "iso_8859-1": "latin-1",
    "iso-8859-1": "latin-1", "gb2312": "gb18030", "gbk": "gb18030", "gb18030": "gb18030", "big5": "big5", "euc-jp": "euc-jp",
    "shift_jis": "shift_jis", "iso-2022-jp": "iso2022_jp", "euc-kr": "euc-kr", "koi8-r": "koi8-r", "koi8-u": "koi8-u",
    "macintosh": "mac-roman", "ibm866": "cp866", "tis-620": "tis-620",
    **{f"iso-8859-{number}": f"iso8859-{number}" for number in (2, 3, 4, 5, 6, 7, 8, 9, 10, 13, 14, 15, 16)},
    **{f"windows-{number}": f"cp{number}" for number in (874, *range(1250, 1259))},
}


class MediaType(typing.NamedTuple):
    """A media type: `type` and `subtype` in lower case, `parameters` {name in lower case: text}. str() is the field value."""

    type: str
    subtype: str
    parameters: dict

    @property
    def essence(self):
        """Type and subtype, without the parameters: "text/html"."""
        return f"{self.type}/{self.subtype}"

    def charset(self, default="utf-8"):
        """Python's name of the codec that `charset` names; `default` without one. ProtocolError (415) if it is not known."""
        label = self.parameters.get("charset")
        if label is None:
            return default
        codec = _CHARSETS.get(label.lower() if label.isascii() else label)
        if codec is None:
            raise _refused("charset", label, "not known here; send UTF-8", 415)
        return codec

    def __str__(self):
        return self.essence + "".join(f"; {name}={_token_or_quoted(text)}" for name, text in self.parameters.items())


def parse_media_type(value):
    """A Content-Type value. -> MediaType; ProtocolError if it is malformed or a parameter comes twice. RFC 9110 section 8.3.1."""
    value = value.strip(" \t")
    found = _media_type_at(value)
    if not found:
        raise _refused("media type", value, "expected type/subtype")
    return MediaType(found[1].lower(), found[2].lower(), _parameters(value, found.end(), "media type"))


def _essence(headers):
    """The type/subtype that Content-Type begins with, in lower case; "" if there is none."""
    found = _media_type_at(headers.get("content-type", ""))
    return found[0].lower() if found else ""


# -- negotiation: weights are thousandths, so that 0.7 is 700 and nothing is rounded

def _weight(text, value):
    found = _is_weight(text)
    if not found:
        raise _refused("weight", text, f"q is 0 to 1 with at most three decimals, in {value!r:.80}")
    return 1000 if found[2] else int((found[1] or "").ljust(3, "0"))


def _parse_accept(value):
    """An Accept value. -> [(MediaType, weight in thousandths)], with ranges such as `*/*` and `text/*`. RFC 9110 section 12.5.1.

    ProtocolError if it is malformed.
    """
    ranges = []
    for element in _parse_list(value):
        media = parse_media_type(element)
        if media.type == "*" and media.subtype != "*":
            raise _refused("Accept", value, f"{element!r:.40} is no media range")
        weight = media.parameters.pop("q", None)
        ranges.append((media, 1000 if weight is None else _weight(weight, value)))
    return ranges


def _parse_weighted(value, what="Accept-Encoding"):
    """A list like `gzip;q=0.8, *` (Accept-Encoding, Accept-Language). -> {token in lower case: weight in thousandths}.

    Of a token that comes several times the first counts. RFC 9110 sections 12.4.2, 12.5.3 and 12.5.4.
    """
    weights = {}
    for element in _parse_list(value):
        token, semicolon, rest = element.partition(";")
        token = token.rstrip(" \t")
        if not _is_token(token):
            raise _refused(what, value, f"{token!r:.40} is no token")
        weight = 1000
        if semicolon:
            rest = rest.lstrip(" \t")
            if rest[:2] not in ("q=", "Q="):
                raise _refused(what, value, f"expected `;q=` after {token!r:.40}")
            weight = _weight(rest[2:], value)
        weights.setdefault(token.lower(), weight)
    return weights


def _remembered(choose):
    """choose(value, offers), of values that are short enough to be remembered."""
    remembered = functools.lru_cache(REMEMBERED)(choose)
    return lambda value, offers: (remembered if len(value) <= REMEMBERED_LENGTH else choose)(value, tuple(offers))


# A preference is a hint, and a server may pass over it (RFC 9110 section 12.1): who sends one that is malformed, as Java's
# clients do with `*; q=.2`, is answered as if without.

@_remembered
def _choose_type(value, offers):
    ranges = _parse_accept(value)
    best, best_weight = None, 0
    for offer in offers:
        media, specific, weight = parse_media_type(offer), -1, 0
        for wanted, its_weight in ranges:
            if wanted.type not in ("*", media.type) or wanted.subtype not in ("*", media.subtype):
                continue
            if not wanted.parameters.items() <= media.parameters.items():
                continue
            how = (wanted.type != "*") + (wanted.subtype != "*") + len(wanted.parameters)
            if how > specific:
                specific, weight = how, its_weight
        if weight > best_weight:
            best, best_weight = offer, weight
    return best


@functools.lru_cache(REMEMBERED)
def _checked_offer(offer):
    try:
        return parse_media_type(offer)
    except ProtocolError as error:              # not the peer's fault
        raise ValueError(f"offer {offer!r:.80}: {error.message}") from None


def negotiate_type(value, offers):
    """The one of `offers` (media types) that an Accept value prefers; None if it takes none of them (406).

    The most specific range that fits an offer gives its weight; of equal weights the earlier offer wins, and so it does without
    an Accept (None) or with a malformed one. RFC 9110 section 12.5.1.
    """
    if not offers:
        raise ValueError("negotiate_type() needs at least one offer")
    for offer in offers:
        _checked_offer(offer)
    try:
        return offers[0] if value is None else _choose_type(value, offers)
    except ProtocolError:
        return offers[0]


@_remembered
def _choose_encoding(value, offers):
    weights = _parse_weighted(value)
    rest = weights.get("*")
    best, best_weight = None, 0
    for offer in offers:
        weight = weights.get(offer)
        if weight is None and offer == "gzip":
            weight = weights.get("x-gzip")
        weight = weight if weight is not None else rest if rest is not None else 0
        if weight > best_weight:
            best, best_weight = offer, weight
    identity = weights.get("identity")
    if identity is not None and identity > best_weight:
        return "identity"
    if best is None and identity is None and rest != 0:
        return "identity"
    return best


def negotiate_encoding(value, offers=("gzip", "deflate")):
    """The one of `offers` (content codings) that an Accept-Encoding value prefers, or "identity"; None if it takes nothing (406).

    Of equal weights the earlier offer wins, and any of them over identity. Without the field (None) or with an empty one it is
    identity: who does not ask for a coding may not know any; so it is with a malformed one. RFC 9110 section 12.5.3.
    """
    try:
        return "identity" if value is None else _choose_encoding(value, offers)
    except ProtocolError:
        return "identity"


@_remembered
def _choose_language(value, offers):
    weights = _parse_weighted(value, "Accept-Language")
    weights = {language: weight for language, weight in weights.items() if len(language) <= MAX_LANGUAGE}
    best, best_weight = None, 0
    for offer in offers:
        tag = offer.lower()
        while tag and tag not in weights:           # the longest range that the tag begins with
            tag = tag.rpartition("-")[0]
        weight = weights.get(tag or "*", 0)
        if weight > best_weight:
            best, best_weight = offer, weight
    if best is not None:
        return best
    refused = {offer for offer in offers if weights.get(offer.lower()) == 0}
    for language, weight in sorted(weights.items(), key=lambda item: -item[1]):
        while weight and language:                  # lookup: `de-CH` is content with `de`
            for offer in offers:
                if offer.lower() == language and offer not in refused:
                    return offer
            language = language.rpartition("-")[0]
    return None


def negotiate_language(value, offers):
    """The one of `offers` (language tags) that an Accept-Language value prefers; None if none fits: take your default.

    `en` fits the offer `en-GB` (filtering, RFC 4647 section 3.3.1); only if nothing fits so is `de-CH` content with the offer
    `de` (lookup, section 3.4). Of equal weights the earlier offer wins; the first one without the field (None) or with a
    malformed one. RFC 9110 section 12.5.4.
    """
    if not offers:
        raise ValueError("negotiate_language() needs at least one offer")
    try:
        return offers[0] if value is None else _choose_language(value, offers)
    except ProtocolError:
        return offers[0]


# -- dates

_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_LONG_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_MONTH = {name: number for number, name in enumerate(_MONTHS, 1)}
_TIME = r"([0-2][0-9]):([0-5][0-9]):([0-6][0-9])"
_is_imf_fixdate = re.compile(
    rf"({'|'.join(_DAYS)}), ([0-3][0-9]) ({'|'.join(_MONTHS)}) ([0-9]{{4}}) {_TIME} GMT").fullmatch
_is_rfc850_date = re.compile(
    rf"({'|'.join(_LONG_DAYS)}), ([0-3][0-9])-({'|'.join(_MONTHS)})-([0-9]{{2}}) {_TIME} GMT").fullmatch
_is_asctime_date = re.compile(
    rf"({'|'.join(_DAYS)}) ({'|'.join(_MONTHS)}) ([ 0-3][0-9]) {_TIME} ([0-9]{{4}})").fullmatch

_EPOCH = datetime.date(1970, 1, 1).toordinal()

# Dates that are remembered, as they are written and as they are read: those of files that are asked for again and again.
REMEMBERED_DATES = 512

# Seconds at which the year 10000 begins, which has no date in HTTP.
_END_OF_DATES = 253_402_300_800


@functools.lru_cache(REMEMBERED_DATES)
def _imf_fixdate(second):
    if not 0 <= second < _END_OF_DATES:
        raise ValueError(f"timestamp {second}: an HTTP date lies between 1970 and 9999")
    year, month, day, hours, minutes, seconds, weekday, _, _ = time.gmtime(second)
    return f"{_DAYS[weekday]}, {day:02d} {_MONTHS[month - 1]} {year:04d} {hours:02d}:{minutes:02d}:{seconds:02d} GMT"


def http_date(timestamp):
    """Seconds since 1970, rounded down, as an IMF-fixdate: "Sun, 06 Nov 1994 08:49:37 GMT". RFC 9110 section 5.6.7.

    Made once for each second: what has been asked for lately is remembered. ValueError before 1970 or after 9999.
    """
    return _imf_fixdate(math.floor(timestamp))


def _timestamp(value, day_name, year, month, day, hours, minutes, seconds):
    try:
        date = datetime.date(year, _MONTH[month], int(day))
    except ValueError:
        raise _refused("date", value, "there is no such day") from None
    hours, minutes, seconds = int(hours), int(minutes), int(seconds)
    if hours > 23 or seconds > 60:              # 60: a leap second
        raise _refused("date", value, "there is no such time")
    if not day_name.startswith(_DAYS[date.weekday()]):
        raise _refused("date", value, f"that day is a {_LONG_DAYS[date.weekday()]}")
    return (date.toordinal() - _EPOCH) * 86400 + hours * 3600 + minutes * 60 + seconds


@functools.lru_cache(REMEMBERED_DATES)
def _imf_timestamp(value):
    """The timestamp of an IMF-fixdate; None if it has another form."""
    found = _is_imf_fixdate(value)
    return found and _timestamp(value, found[1], int(found[4]), found[3], found[2], *found.groups()[4:])


def parse_http_date(value, now):
    """The seconds since 1970 that a date stands for, an int. ProtocolError if it is none, or was another day of the week.

    All three formats are read. `now` (seconds since 1970) tells the century of an RFC 850 date, whose year has two digits: the
    last that is not more than 50 years ahead. RFC 9110 section 5.6.7.
    """
    if len(value) == 29:
        timestamp = _imf_timestamp(value)
        if timestamp is not None:
            return timestamp
    found = _is_rfc850_date(value)
    if found:
        day_name, day, month, year, *clock = found.groups()
        this_year, *rest = time.gmtime(now)[:6]
        year = this_year - this_year % 100 + 100 + int(year)
        while (year, _MONTH[month], int(day), *map(int, clock)) > (this_year + 50, *rest):
            year -= 100
        return _timestamp(value, day_name, year, month, day, *clock)
    found = _is_asctime_date(value)
    if found:
        return _timestamp(value, found[1], int(found[7]), found[2], found[3].replace(" ", "0"), *found.groups()[3:6])
    raise _refused("date", value, "expected the form `Sun, 06 Nov 1994 08:49:37 GMT`")


def _parse_retry_after(value, now):
    """The seconds to wait that a Retry-After value asks for, counted from `now`; at least 0. RFC 9110 section 10.2.3."""
    if _is_digits(value):
        return int(value)
    return max(0, parse_http_date(value, now) - now)


# -- entity tags: they stay texts, `"x"` and `W/"x"`

_ENTITY_TAG = r'(?:W/)?"[\x21\x23-\x7e\x80-\xff]*+"'
_is_entity_tag = re.compile(_ENTITY_TAG).fullmatch
_entity_tag_at = re.compile(rf"[ \t]*+(?:({_ENTITY_TAG})[ \t]*+)?(?:,|\Z)").match


def entity_tag(opaque, *, weak=False):
    """An entity tag from the text between its quotes. ValueError if that has spaces, quotes, controls or beyond U+00FF."""
    tag = f'{"W/" if weak else ""}"{opaque}"'
    if not _is_entity_tag(tag):
        raise ValueError(f"{opaque!r:.80} cannot be an entity tag: no spaces, quotes, controls, characters beyond U+00FF")
    return tag


def _content_tag(content, *, weak=False):
    """The entity tag of this content (bytes): a hash of 96 bits, so that two contents have one tag by chance in 2**48 of them."""
    return entity_tag(hashlib.blake2b(content, digest_size=12).hexdigest(), weak=weak)


def _parse_entity_tags(value):
    """An If-Match or If-None-Match value. -> the list of its entity tags, or "*". ProtocolError if it is malformed."""
    value = value.strip(" \t")
    if value == "*":
        return value
    tags, at = [], 0
    while at < len(value):
        found = _entity_tag_at(value, at)
        if not found:
            raise _refused("entity tags", value, f'expected "…" or W/"…" and a comma at character {at + 1}')
        at = found.end()
        if found[1]:
            tags.append(found[1])
    if not tags:
        raise _refused("entity tags", value, "there is none")
    return tags


def _strong_match(tag, other):
    """Whether two entity tags are equal by strong comparison: equal, and neither is weak. RFC 9110 section 8.8.3.2."""
    return tag == other and not tag.startswith("W/")


def _weak_match(tag, other):
    """Whether two entity tags are equal by weak comparison: whether weak or not. RFC 9110 section 8.8.3.2."""
    return tag.removeprefix("W/") == other.removeprefix("W/")


# -- Content-Disposition and Link

_value_at = re.compile(_TOKEN_PATTERN).match
_link_target_at = re.compile(r"[ \t,]*+<([^<>\x00-\x20\x7f]*+)>").match
_link_parameter_at = re.compile(
    rf"{_OWS};{_OWS}(?:({_TOKEN_PATTERN})(?:{_OWS}={_OWS}(?:({_TOKEN_PATTERN})|({_QUOTED})))?)?").match
_list_end_at = re.compile(r"[ \t]*+(?:,[ \t,]*+|\Z)").match

# What no file name of ours has: controls, separators of paths, what makes text run backwards and so hides an ending, halves of
# characters. Windows forbids the rest.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f/\\\\\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_UNSAFE_ASCII = re.compile(r'[^\x20-\x7e]|["%\\]')
_UNSAFE_ON_DISK = re.compile('[<>:"|?*]')
_is_device = re.compile(r"(?:CON|PRN|AUX|NUL|COM[0-9]|LPT[0-9])(?:[ .]|\Z)", re.IGNORECASE).match


def safe_filename(name, default="download"):
    """A file name from anywhere made one that can be created in a folder of yours: its last component, without controls, leading
    dots, trailing dots and spaces, and what Windows forbids; at most 255 bytes. `default` if nothing is left.
    """
    name = re.split(r"[/\\]", name)[-1]
    name = _UNSAFE_ON_DISK.sub("_", _UNSAFE.sub("_", name)).strip(" .")
    if _is_device(name):
        name = f"_{name}"
    name = name.encode()[:MAX_FILENAME].decode(errors="ignore").rstrip(" .")
    return name or default


def content_disposition(filename=None, disposition="attachment"):
    """A Content-Disposition value for any file name: nothing in it can end the value or leave a folder.

    Controls, separators of paths and marks of direction become "_". A name beyond plain ASCII is sent twice, as `filename*` in
    UTF-8 and with "_" for what is not ASCII. ValueError if `disposition` is no token. RFC 6266.
    """
    if not _is_token(disposition):
        raise ValueError(f"disposition={disposition!r:.40}: give a token, attachment or inline")
    if filename is None:
        return disposition
    filename = _UNSAFE.sub("_", filename)[:MAX_FILENAME] or "_"
    if filename in (".", ".."):
        filename = "_"
    plain = _UNSAFE_ASCII.sub("_", filename)
    value = f'{disposition}; filename="{plain}"'
    if plain != filename:
        value += f"; filename*=UTF-8''{urllib.parse.quote(filename, safe='!#$&+-.^_`|~')}"
    return value


def parse_links(value):
    """A Link value. -> [(target, {name in lower case: text})]; of a parameter that comes several times the first counts.

    `title*` stands in for `title`; a parameter without a value is "". ProtocolError if it is malformed. RFC 8288 section 3.
    """
    links, at = [], 0
    while at < len(value):
        found = _link_target_at(value, at)
        if not found:
            raise _refused("Link", value, f"expected `<target>` at character {at + 1}")
        at, target, parameters, better = found.end(), found[1], {}, {}
        while found := _link_parameter_at(value, at):
            at = found.end()
            name, token, quoted = found.groups()
            if name is None:
                continue
            name, text = name.lower(), token or (_unquoted(quoted) if quoted else "")
            if name.endswith("*"):
                text = _extended(text)
                if text is not None:
                    better.setdefault(name[:-1], text)
            else:
                parameters.setdefault(name, text)
        found = _list_end_at(value, at)
        if not found:
            raise _refused("Link", value, f"expected `; name=value` or a comma at character {at + 1}")
        at = found.end()
        links.append((target, {**parameters, **better}))
    return links


# -- authentication

# 1*SP after a scheme, then either token68 or parameters: `abc=` is the first, `abc=x` the second, told apart by what follows.
_auth_scheme_at = re.compile(rf"({_TOKEN_PATTERN})(?: ++|(?=[ \t]*+(?:,|\Z)))").match
_token68_at = re.compile(r"(?<= )([0-9A-Za-z\-._~+/]++=*+)(?=[ \t]*+(?:,|\Z))").match
_auth_parameter_at = re.compile(rf"({_TOKEN_PATTERN})[ \t]*+=[ \t]*+(?:({_TOKEN_PATTERN})|({_QUOTED}))(?=[ \t]*+(?:,|\Z))").match
_commas_at = re.compile(r"[ \t,]*+").match
_is_token68 = re.compile(r"[0-9A-Za-z\-._~+/]++=*+").fullmatch
_is_base64 = re.compile(r"(?:[0-9A-Za-z+/]{4})*+(?:[0-9A-Za-z+/]{2}==|[0-9A-Za-z+/]{3}=)?").fullmatch

_DIGESTS = {"md5": hashlib.md5, "sha-256": hashlib.sha256}


class _Challenge(typing.NamedTuple):
    """What WWW-Authenticate asks for, and credentials too, which have the same form: `scheme` in lower case, and after it
    either `token` (token68, else None) or `parameters` {name in lower case: text}. RFC 9110 section 11.
    """

    scheme: str
    token: str | None
    parameters: dict


def _parse_challenges(value):
    """A WWW-Authenticate or Proxy-Authenticate value. -> [_Challenge], in the server's order. RFC 9110 section 11.6.1.

    ProtocolError if it is malformed or a parameter comes twice.
    """
    challenges, at = [], _commas_at(value).end()
    while at < len(value):
        found = challenges and challenges[-1].token is None and _auth_parameter_at(value, at)
        if found:
            name, parameters = found[1].lower(), challenges[-1].parameters
            if name in parameters:
                raise _refused("challenge", value, f"parameter {name} comes twice")
            parameters[name] = found[2] if found[2] is not None else _unquoted(found[3])
        else:
            found = _auth_scheme_at(value, at)
            if not found:
                raise _refused("challenge", value, f"expected a scheme or `name=value` at character {at + 1}")
            scheme, token = found[1].lower(), _token68_at(value, found.end())
            found = token or found
            challenges.append(_Challenge(scheme, token and token[1], {}))
            if found.end() < len(value) and value[found.end()] not in " \t," and not _auth_parameter_at(value, found.end()):
                raise _refused("challenge", value, f"expected `name=value` at character {found.end() + 1}")
        at = _commas_at(value, found.end()).end()
    return challenges


def _parse_credentials(value):
    """An Authorization or Proxy-Authorization value. -> _Challenge. ProtocolError if it is malformed, or is more than one."""
    try:
        [credentials] = _parse_challenges(value)
    except (ProtocolError, ValueError):         # its message would show what is secret
        raise ProtocolError(400, "Authorization: expected one scheme, and one token or `name=value, …` after it") from None
    return credentials


def _challenge(scheme, **parameters):
    """A WWW-Authenticate value: _challenge("Basic", realm="shop", charset="UTF-8"). All texts are quoted.

    ValueError for a name that is no token, or a text that cannot be quoted.
    """
    for name in (scheme, *parameters):
        if not _is_token(name):
            raise ValueError(f"{name!r:.40} is no token")
    return f"{scheme} " + ", ".join(f"{name}={_quote(text)}" for name, text in parameters.items()) if parameters else scheme


def _basic_credentials(user, password):
    """An Authorization value for basic authentication, in UTF-8. ValueError for a colon in `user`, or a control. RFC 7617."""
    if ":" in user:
        raise ValueError(f"user {user!r:.40} has a colon, which ends the name in basic authentication")
    if re.search("[\x00-\x1f\x7f]", user + password):
        raise ValueError("user or password has a control character, which basic authentication does not allow")
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def _parse_basic(value):
    """(user, password) of an Authorization value; None if its scheme is not basic. ProtocolError if it is malformed.

    UTF-8 is expected, as _challenge("Basic", charset="UTF-8", …) asks for.
    """
    credentials = _parse_credentials(value)
    if credentials.scheme != "basic":
        return None
    token = credentials.token
    try:
        if not token or not _is_base64(token):
            raise ValueError
        user, colon, password = base64.b64decode(token).decode().partition(":")
        if not colon or re.search("[\x00-\x1f\x7f]", user + password):
            raise ValueError
    except ValueError:
        raise ProtocolError(400, "Authorization: basic takes base64 of user:password in UTF-8, without controls") from None
    return user, password


def _bearer_credentials(token):
    """An Authorization value with a bearer token. ValueError if it has characters that none can have. RFC 6750 section 2.1."""
    if not _is_token68(token):
        raise ValueError("a bearer token consists of letters, digits and -._~+/, with = at its end")
    return f"Bearer {token}"


def _parse_bearer(value):
    """The token of an Authorization value; None if its scheme is not bearer. ProtocolError if it is malformed. RFC 6750."""
    credentials = _parse_credentials(value)
    if credentials.scheme != "bearer":
        return None
    if credentials.token is None:
        raise ProtocolError(400, "Authorization: bearer takes one token of letters, digits and -._~+/")
    return credentials.token


def _best_challenge(challenges):
    """The one of `challenges` that a user and a password can answer best: the first digest that is understood, else basic;
    None if there is neither. RFC 7616 section 3.7.
    """
    for one in challenges:
        if one.scheme == "digest" and _digest_of(one) and one.parameters.keys() >= {"realm", "nonce"} and (
                "qop" not in one.parameters or "auth" in _parse_tokens(one.parameters["qop"])):
            return one
    return next((one for one in challenges if one.scheme == "basic"), None)


def _digest_of(one):
    return _DIGESTS.get(one.parameters.get("algorithm", "MD5").lower().removesuffix("-sess"))


def _digest_credentials(asked, user, password, *, method, target, cnonce, count=1):
    """An Authorization value that answers the digest challenge `asked`, for one request. RFC 7616 section 3.4.

    `target` is the request target as sent, `cnonce` a random token, `count` how many requests this nonce has been used for, this
    one included. MD5 and SHA-256, both also -sess; quality of protection auth, or none (RFC 2069). ValueError for a challenge
    that _best_challenge() would not have chosen.
    """
    if _best_challenge([asked]) is not asked or asked.scheme != "digest":
        raise ValueError("digest is answered with MD5 or SHA-256 and qop=auth; take what _best_challenge() gives")
    parameters, function = asked.parameters, _digest_of(asked)

    def digest(*texts):
        return function(":".join(texts).encode(), usedforsecurity=False).hexdigest()

    algorithm, realm, nonce = parameters.get("algorithm", ""), parameters["realm"], parameters["nonce"]
    secret = digest(user, realm, password)
    if algorithm.lower().endswith("-sess"):
        secret = digest(secret, nonce, cnonce)
    hashed = digest(method, target)
    fields = {"realm": _quote(realm), "uri": _quote(target), "nonce": _quote(nonce)}
    if "qop" in parameters:
        fields |= {"nc": f"{count:08x}", "cnonce": _quote(cnonce), "qop": "auth",
                   "response": f'"{digest(secret, nonce, f"{count:08x}", cnonce, "auth", hashed)}"'}
    else:
        fields["response"] = f'"{digest(secret, nonce, hashed)}"'
        if algorithm.lower().endswith("-sess"):
            fields["cnonce"] = _quote(cnonce)
    if algorithm:
        fields["algorithm"] = algorithm
    if "opaque" in parameters:
        fields["opaque"] = _quote(parameters["opaque"])
    if parameters.get("userhash", "").lower() == "true":
        fields = {"username": _quote(digest(user, realm)), **fields, "userhash": "true"}
    elif re.fullmatch(r"[\x20-\x7e]*+", user):
        fields = {"username": _quote(user), **fields}
    else:
        fields = {"username*": f"UTF-8''{urllib.parse.quote(user, safe='')}", **fields}
    return "Digest " + ", ".join(f"{name}={text}" for name, text in fields.items())


# -- proxies

_is_address = re.compile(r"[0-9A-Fa-f:.]{2,45}").fullmatch
_is_node = re.compile(
    r"(?:\[([0-9A-Fa-f:.]{2,45})\]|([0-9.]{7,15}))(?::[0-9]{1,5})?|([0-9A-Fa-f:.]{2,45})|unknown|_[0-9A-Za-z._-]++").fullmatch


class Forwarding(typing.NamedTuple):
    """What trusted proxies say of a request: `client` (an address; None if hidden), `scheme`, `host` (None if not said)."""

    client: str | None
    scheme: str | None
    host: str | None


def _parse_forwarded(value):
    """A Forwarded value. -> [{name in lower case: text}], the nearest hop last. ProtocolError if it is malformed. RFC 7239."""
    return [_parameters(";" + element, 0, "Forwarded") for element in _parse_list(value)]


class TrustedProxies:
    """Who sent a request, if proxies of yours hand it on: the address nearest to you that is none of them.

    `networks`: addresses and networks whose word you trust ("10.0.0.0/8", "::1"), and "unix" for peers without an address.
    `field` says what your proxies set: "x-forwarded" (X-Forwarded-For, -Proto, -Host) or "forwarded" (RFC 7239). Only that is
    looked at: a proxy that sets one of them hands on what the client has written into the other. Every entry counts that a
    trusted one has made, from the last to the first; what stands before them anybody may have invented.
    """

    def __init__(self, networks, *, field="x-forwarded"):
        if field not in ("x-forwarded", "forwarded"):
            raise ValueError(f'field={field!r:.40}: "x-forwarded" or "forwarded", whichever your proxies set')
        if isinstance(networks, str):
            raise TypeError(f"networks={networks!r:.40}: give a list of addresses and networks")
        self._forwarded = field == "forwarded"
        self._unix = "unix" in networks
        self._networks = [ipaddress.ip_network(network) for network in networks if network != "unix"]

    def trusts(self, address):
        """Whether this address is one of yours; None stands for a peer on a Unix socket."""
        if address is None:
            return self._unix
        if not _is_address(address):
            return False
        try:
            found = ipaddress.ip_address(address)
        except ValueError:
            return False
        found = getattr(found, "ipv4_mapped", None) or found
        return any(found in network for network in self._networks)

    def client(self, peer, headers):
        """What is true of a request from `peer` (the address of the connection, None on a Unix socket). -> Forwarding

        ProtocolError if the fields are malformed as far as they count.
        """
        if not self.trusts(peer):
            return Forwarding(peer, None, None)
        if self._forwarded:
            hops = _parse_forwarded(headers._combined("forwarded"))
        else:
            hops = [{"for": hop} for hop in _parse_list(headers._combined("x-forwarded-for"))]
            for name, key in (("x-forwarded-proto", "proto"), ("x-forwarded-host", "host")):
                said = _parse_list(headers._combined(name))
                if said:                    # most proxies overwrite it; if each adds its own, the nearest one's is last
                    hops = hops or [{}]
                    for hop in hops:
                        hop[key] = said[-1]
        address, scheme, host = peer, None, None
        for hop in reversed(hops):
            scheme, host = hop.get("proto", scheme), hop.get("host", host)
            if "for" not in hop:
                break
            found = _is_node(hop["for"])
            if not found:
                raise _refused("forwarded", hop["for"], "neither an address nor `unknown` nor `_name`")
            address = found[1] or found[2] or found[3]
            if address is None or not self.trusts(address):
                break
        if scheme is not None and scheme not in ("http", "https"):
            raise _refused("forwarded", scheme, "the scheme is http or https")
        if host is not None and (problem := _authority_problem(host)):
            raise _refused("forwarded", host, f"as a host it {problem}")
        return Forwarding(address, scheme, host)


# -- Cache-Control, Strict-Transport-Security

_DELTAS = {"max-age", "s-maxage", "max-stale", "min-fresh", "stale-while-revalidate", "stale-if-error"}
_directive = re.compile(rf"({_TOKEN_PATTERN})(?:=(?:({_TOKEN_PATTERN})|({_QUOTED})))?").fullmatch


def _parse_cache_control(value):
    """A Cache-Control value. -> {directive in lower case: its text, seconds (an int) if it counts them, None without one}.

    Of a directive that comes several times the first counts. Seconds beyond 2**31 are 2**31. ProtocolError if it is malformed,
    or seconds are no number: take the response as stale then. RFC 9111 sections 4.2.1 and 5.2.
    """
    directives = {}
    for element in _parse_list(value):
        found = _directive(element)
        if not found:
            raise _refused("Cache-Control", value, f"{element!r:.40} is no directive")
        name, text = found[1].lower(), found[2] if found[3] is None else _unquoted(found[3])
        if name in _DELTAS and (text is not None or name != "max-stale"):
            if text is None or not re.fullmatch("[0-9]{1,1000}", text):
                raise _refused("Cache-Control", value, f"{name} takes a number of seconds")
            text = min(int(text), MAX_DELTA)
        directives.setdefault(name, text)
    return directives


def cache_control(**directives):
    """A Cache-Control value: cache_control(public=True, max_age=3600). True is a directive without a value, False and None none.

    ValueError for what is no directive.
    """
    parts = []
    for name, value in directives.items():
        name = name.replace("_", "-")
        if not _is_token(name):
            raise ValueError(f"{name!r:.40} is no directive")
        if name in _DELTAS and value is not None and value is not False and not (name == "max-stale" and value is True):
            if type(value) is not int or value < 0:
                raise ValueError(f"{name}={value!r:.40}: give seconds, an int from 0")
        if value is True:
            parts.append(name)
        elif value is not None and value is not False:
            parts.append(f"{name}={_token_or_quoted(str(value))}")
    if not parts:
        raise ValueError("cache_control() needs at least one directive")
    return ", ".join(parts)


def _strict_transport_security(max_age, *, include_subdomains=False, preload=False):
    """A Strict-Transport-Security value; max_age in seconds, 0 ends it. RFC 6797 section 6.1.

    ValueError if the browsers' preload lists would not take it: they want a year and the subdomains (hstspreload.org).
    """
    if type(max_age) is not int or max_age < 0:
        raise ValueError(f"max_age={max_age!r:.40}: give seconds, an int from 0")
    if preload and not (include_subdomains and max_age >= 31_536_000):
        raise ValueError("preload=True needs include_subdomains=True and max_age of 31536000 (a year) or more")
    return f"max-age={max_age}" + "; includeSubDomains" * include_subdomains + "; preload" * preload


# ---- cookies --------------------------------------------------------------------------------------------------
# After RFC 6265 and what browsers have added (RFC 6265bis, CHIPS).
#
# Reading: whoever controls one host of a domain can give the browser cookies for all of its hosts, so a pair that is malformed is
# passed over and never a reason to refuse the request: it could lock somebody out. Of several pairs with one name the first
# counts: browsers send the one with the longest path first (RFC 6265 section 5.4).
# Making: only what the grammar allows, as everything between here and there may read the rest in its own way.

# Cookies in one request. Chrome keeps 180 for a domain, Firefox 150.
MAX_COOKIES = 1000

# Bytes of name and value together, and of one attribute's value: beyond these browsers drop the cookie, or the attribute.
MAX_COOKIE, MAX_COOKIE_ATTRIBUTE = 4096, 1024

# Seconds that the clock which has signed may be ahead of the one that verifies.
CLOCK_SKEW = 60

_cookie_pairs = re.compile(rf"(?:^|;)[ \t]*+({_TOKEN_PATTERN})[ \t]*+=[ \t]*+([^;\x00-\x08\x0a-\x1f\x7f]*+)(?=;|\Z)").findall
_cookie_octets = re.compile(r"[\x21\x23-\x2b\x2d-\x3a\x3c-\x5b\x5d-\x7e]*+").match
_LABEL = "[0-9A-Za-z](?:[0-9A-Za-z-]{0,61}[0-9A-Za-z])?"
_is_domain = re.compile(rf"(?:{_LABEL}\.)*{_LABEL}").fullmatch
_is_path = re.compile(r"/[\x20-\x3a\x3c-\x7e]*+").fullmatch
_SAME_SITE = {"strict": "Strict", "lax": "Lax", "none": "None"}


def _parse_cookies(value, *, max_cookies=MAX_COOKIES):
    """A Cookie value (several fields joined with "; "). -> {name: value}; of several with one name the first counts.

    Quotes around a value are taken off. Pairs without a name that is a token, without "=", or with control characters are passed
    over. ProtocolError (431) for more than `max_cookies`.
    """
    pairs = _cookie_pairs(value)
    if len(pairs) > max_cookies:
        raise ProtocolError(431, f"{len(pairs)} cookies, {max_cookies} are allowed (max_cookies)")
    cookies = dict(pairs)
    if len(cookies) == len(pairs) and '"' not in value and " ;" not in value and "\t" not in value and value[-1:] != " ":
        return cookies                          # nothing to take off: 0.5 µs less
    cookies = {}
    for name, text in pairs:
        if name not in cookies:
            if text[-1:] in " \t\"":
                text = text.rstrip(" \t")
                if len(text) > 1 and text[0] == text[-1] == '"':
                    text = text[1:-1]
            cookies[name] = text
    return cookies


def _cookie_pair(name, value):
    if not _is_token(name):
        raise ValueError(f"cookie name {name!r:.80} is no token: letters, digits and !#$%&'*+-.^_`|~")
    end = _cookie_octets(value).end()
    if end < len(value):
        raise ValueError(f"cookie {name}: its value has {value[end]!r} at {end}; printable ASCII but space \" , ; \\ is allowed: "
                         "encode it first (urllib.parse.quote, base64, Signer)")
    if len(name) + len(value) > MAX_COOKIE:
        raise ValueError(f"cookie {name}: name and value have {len(name) + len(value)} bytes, browsers take {MAX_COOKIE}")
    return f"{name}={value}"


def _check_cookie_rules(name, domain, path, secure, same_site, partitioned):
    """What browsers silently drop a cookie for is an error here."""
    prefix = name.lower()
    if prefix.startswith("__secure-") and not secure:
        raise ValueError(f"cookie {name}: __Secure- needs secure=True")
    if prefix.startswith("__host-") and not (secure and domain is None and path == "/"):
        raise ValueError(f'cookie {name}: __Host- needs secure=True, path="/" and no domain')
    if same_site == "None" and not secure:
        raise ValueError(f'cookie {name}: same_site="None" needs secure=True')
    if partitioned and not secure:
        raise ValueError(f"cookie {name}: partitioned=True needs secure=True")
    if domain is not None and not (len(domain) <= 253 and _is_domain(domain)):
        raise ValueError(f"cookie {name}: domain={domain!r:.80}: give a host name in ASCII, without a dot before it")
    if path is not None and not (len(path) <= MAX_COOKIE_ATTRIBUTE and _is_path(path)):
        raise ValueError(f"cookie {name}: path={path!r:.80}: give printable ASCII that begins with / and has no ;, "
                         f"at most {MAX_COOKIE_ATTRIBUTE} bytes")


def _set_cookie(name, value, *, max_age=None, expires=None, domain=None, path="/", secure=False, http_only=False,
               same_site="Lax", partitioned=False):
    """A Set-Cookie value. RFC 6265 section 4.1, with SameSite, Partitioned and the prefixes of names.

    `max_age` in seconds (0: delete it), `expires` a timestamp; with neither it lasts until the browser is closed. `path`: None
    is the folder of the request. `same_site`: "Strict", "Lax", "None", or None to leave it out. ValueError for what has no place
    in a cookie, and for what browsers would drop.
    """
    same = same_site and _SAME_SITE.get(same_site.lower())
    if same_site is not None and same is None:
        raise ValueError(f'cookie {name}: same_site={same_site!r:.40}: "Strict", "Lax" or "None"')
    parts = [_cookie_pair(name, value)]
    _check_cookie_rules(name, domain, path, secure, same, partitioned)
    if expires is not None:
        parts.append(f"Expires={http_date(expires)}")
    if max_age is not None:
        if type(max_age) is not int:
            raise TypeError(f"cookie {name}: max_age={max_age!r:.40}: give seconds, an int")
        parts.append(f"Max-Age={max_age}")
    if domain is not None:
        parts.append(f"Domain={domain}")
    if path is not None:
        parts.append(f"Path={path}")
    parts += ["Secure"] * bool(secure) + ["HttpOnly"] * bool(http_only) + [f"SameSite={same}"] * (same is not None)
    parts += ["Partitioned"] * bool(partitioned)
    return "; ".join(parts)


def _delete_cookie(name, **attributes):
    """A Set-Cookie value that deletes a cookie. Domain, path and partition must be those it was set with; see _set_cookie()."""
    return _set_cookie(name, "", **{**attributes, "max_age": 0, "expires": 0})


class SignatureError(flowcoro.FlowCoroError):
    """A signed value that was not signed with these keys for this purpose, or is too old: take it as not sent."""


class Signer:
    """Signs values that go to a client and come back, such as a session in a cookie: readable by all, changed by none.

    `keys`: one secret or several (bytes, each 16 or more), the newest first: it signs, and all verify, so that keys can be
    rotated. `purpose` keeps what is signed for one thing from being taken for another.

    A signed value is `payload.timestamp.signature`: base64url of the payload, seconds since 1970 in decimal, base64url of the
    HMAC-SHA256 of the two before, with a key derived from secret and purpose. It fits into a cookie and a URL as it is.
    """

    def __init__(self, keys, *, purpose="session"):
        keys = [keys] if isinstance(keys, (bytes, bytearray)) else list(keys)
        if not keys or not all(isinstance(key, (bytes, bytearray)) for key in keys):
            raise TypeError("keys: give bytes, or a list of them, the newest first; secrets.token_bytes(32) makes one")
        if min(map(len, keys)) < 16:
            raise ValueError("keys: a secret of less than 16 bytes can be guessed; secrets.token_bytes(32) makes one")
        self._keys = [hmac.digest(key, b"flowcoro signed " + purpose.encode(), "sha256") for key in keys]

    def sign(self, payload, now):
        """The signed value of `payload` (bytes), made at the timestamp `now`: a str, 4/3 as long and about 55 more."""
        text = f"{_base64url(payload)}.{math.floor(now)}"
        return f"{text}.{_base64url(hmac.digest(self._keys[0], text.encode(), 'sha256'))}"

    def verify(self, value, now, *, max_age=None):
        """The payload of a signed value, if it was signed with one of the keys and at most `max_age` seconds before `now`.

        SignatureError otherwise. The comparison takes as long whatever is wrong, and every key is tried.
        """
        found = _is_signed(value)
        if not found:
            raise SignatureError("no signed value: expected payload.timestamp.signature")
        text, given, valid = found[1].encode(), found[4].encode(), False
        for key in self._keys:
            valid |= hmac.compare_digest(_base64url(hmac.digest(key, text, "sha256")).encode(), given)
        if not valid:
            raise SignatureError("the signature does not fit: another key, another purpose, or it was changed")
        age = now - int(found[3])
        if age < -CLOCK_SKEW:
            raise SignatureError(f"signed {-age:.0f} s in the future, {CLOCK_SKEW} are allowed: a clock is wrong")
        if max_age is not None and age > max_age:
            raise SignatureError(f"signed {age:.0f} s ago, {max_age} are allowed (max_age)")
        return base64.urlsafe_b64decode(found[2] + "=" * (-len(found[2]) % 4))


_is_signed = re.compile(r"(([0-9A-Za-z_-]*+)\.([0-9]{1,12}))\.([0-9A-Za-z_-]{43})").fullmatch


def _base64url(data):
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


# ---- forms ----------------------------------------------------------------------------------------------------
# application/x-www-form-urlencoded as browsers write it (the URL standard, section 5), multipart/form-data after RFC 7578 and
# RFC 2046 section 5.1.
#
# A multipart body is a sequence of lines that are delimiters (CRLF "--" boundary) and what stands between them. The parser looks
# for a delimiter with one find(), and holds back no more of a part's data than could be the beginning of one: from the last CR,
# if what follows it fits. So data leave as they come, and every byte is looked at a constant number of times however the input is
# cut. What is left of the input is `_buffer[_at:]`; it is cut off in front only when more comes.

# Fields of a form, and bytes of one that is read as a whole. PHP: 1000 fields; Django: 1000, and 2.5 MB without files.
MAX_FORM_FIELDS, MAX_FORM_BYTES = 1000, 2 * 2**20

# Parts of a multipart body, bytes of one part's head, bytes of a part that is no file and bytes of one that is.
MAX_PARTS, MAX_PART_HEAD, MAX_FIELD_BYTES, MAX_FILE_BYTES = 1000, 8 * 2**10, 2**20, 2**30

# Bytes of a multipart body as a whole.
MAX_MULTIPART_BYTES = 2**31

# Bytes before the first delimiter and after the last, which nobody sends any more, and of blanks that end a delimiter.
MAX_PREAMBLE, MAX_PADDING = 8 * 2**10, 256

# Bytes of a content that is copied to its neighbours in a body that is made, so that they are sent together.
SMALL_PIECE = 64 * 2**10

_BAD_ESCAPE = "%(?![0-9A-Fa-f]{2})"
_bad_escape = re.compile(_BAD_ESCAPE.encode()).search
_BOUNDARY = "1 to 70 letters, digits or '()+_,-./:=? and no blank at the end"
_is_boundary = re.compile(r"[0-9A-Za-z'()+_,\-./:=? ]{0,69}[0-9A-Za-z'()+_,\-./:=?]").fullmatch
_padding_at = re.compile(rb"[ \t]*+").match
_part_line = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]++):[ \t]*+([\t\x20-\x7e\x80-\xff]*+)").fullmatch
_form_parameter_at = re.compile(
    rf'{_OWS};{_OWS}(?:({_TOKEN_PATTERN})=(?:({_TOKEN_PATTERN})|"([^"\\]*+(?:\\.[^"\\]*+)*+)"))?').match
_form_escape = re.compile(r'\\(["\\])|%(22|0[dDaA])')


def _parse_urlencoded(data, *, max_fields=MAX_FORM_FIELDS, max_bytes=MAX_FORM_BYTES, limit="max_fields"):
    """A query string (str), or a body of application/x-www-form-urlencoded (bytes). -> [(name, value)], text, as they come.
    `limit`: the name of max_fields for those who are refused.

    A field without "=" has the value ""; empty ones are left out. ProtocolError: 413 for more fields or bytes than allowed, 400
    for a "%" without two hexadecimal digits or bytes that are no UTF-8.
    """
    if isinstance(data, str):
        if "%" not in data and data.count("&") < max_fields and len(data) <= max_bytes and data.isascii():
            return [field.partition("=")[::2] for field in data.replace("+", " ").split("&") if field]      # 1 µs instead of 3
        data = data.encode()
    if len(data) > max_bytes:
        raise ProtocolError(413, f"form of {len(data)} bytes, {max_bytes} are allowed (max_bytes)")
    if data.count(b"&") >= max_fields and len([None for field in data.split(b"&") if field]) > max_fields:
        raise ProtocolError(413, f"form of more than {max_fields} fields ({limit})")
    if _bad_escape(data):
        raise _refused("form", bytes(data[_bad_escape(data).start():][:3]), "a % is followed by two hexadecimal digits")
    try:
        text = urllib.parse.unquote_to_bytes
        pairs = [field.partition(b"=") for field in data.replace(b"+", b" ").split(b"&") if field]
        return [(text(name).decode(), text(value).decode()) for name, _, value in pairs]
    except UnicodeDecodeError:
        raise ProtocolError(400, "form: its names and values are no UTF-8") from None


def _encode_urlencoded(fields):
    """Pairs or a dict as application/x-www-form-urlencoded. -> bytes. Of a value that is a list each item is sent."""
    return urllib.parse.urlencode(fields, doseq=True).encode()


class _PartBegin(typing.NamedTuple):
    """A part of a multipart body begins. `filename` is None if it is no file, and as the peer says: see safe_filename().

    `content_type` is its Content-Type value or None; `headers` are all of its header fields.
    """

    name: str
    filename: str | None
    content_type: str | None
    headers: Headers


class _PartData(typing.NamedTuple):
    """Some of a part's content: bytes, not empty. How it is cut depends on how the body came."""

    data: bytes


class _PartEnd(typing.NamedTuple):
    """The part is complete."""


class _FormEnd(typing.NamedTuple):
    """The body is complete."""


def _multipart_boundary(value):
    """The boundary that a Content-Type value of multipart/form-data names, as bytes.

    ProtocolError: 415 for another media type, 400 for a boundary that is missing or malformed (1 to 70 characters, RFC 2046).
    """
    media = parse_media_type(value)
    if media.essence != "multipart/form-data":
        raise _refused("media type", value, "expected multipart/form-data", 415)
    boundary = media.parameters.get("boundary", "")
    if not _is_boundary(boundary):
        raise _refused("boundary", boundary, _BOUNDARY)
    return boundary.encode()


class _MultipartParser:
    """Reads a multipart/form-data body: receive_data(bytes), then next_event() until it is NEED_DATA; b"" is the end.

        _PartBegin _PartData* _PartEnd   for each part, and at the end
        _FormEnd

    A part that breaks off has no _PartEnd, and a body that breaks off no _FormEnd. `boundary` as _multipart_boundary() gives it.
    Limits are of bytes, but for `max_parts`; they say 413. Take all events before more data are given: memory is then bounded by
    the largest piece given, max_head_bytes and a delimiter.
    """

    def __init__(self, boundary, *, max_parts=MAX_PARTS, max_head_bytes=MAX_PART_HEAD, max_field_bytes=MAX_FIELD_BYTES,
                 max_file_bytes=MAX_FILE_BYTES, max_total_bytes=MAX_MULTIPART_BYTES):
        self._delimiter = b"\r\n--" + boundary
        self._buffer, self._at = bytearray(b"\r\n"), 0  # so that the first delimiter looks like the others
        self._scan = 0              # up to here there is no end of a head
        self._state = _MultipartParser._preamble         # the function, as a bound method would make it garbage of a cycle
        self._parts = 0             # begun
        self._skipped = 0           # bytes of preamble or epilogue
        self._left = 0              # bytes that this part may still have
        self._limit = ""            # its name
        self._prefix = 0            # 2 while the CRLF after a head has not been passed: it may be a delimiter's
        self._room = max_total_bytes
        self._over = self._ended = False
        self._error = None
        self._max_parts, self._max_head, self._max_total = max_parts, max_head_bytes, max_total_bytes
        self._max_field, self._max_file = max_field_bytes, max_file_bytes

    def receive_data(self, data):
        """Take the next piece of the body, bytes or the like; b"" says that there is no more. ValueError after that."""
        if self._ended:
            raise ValueError("receive_data() after the end")
        if not len(data):
            self._ended = True
            return
        if len(data) > self._room:
            data, self._over = memoryview(data)[:self._room], True
        self._room -= len(data)
        del self._buffer[:self._at]
        self._scan = max(0, self._scan - self._at)
        self._at = 0
        self._buffer += data

    def next_event(self):
        """The next event, or NEED_DATA; at the end _FormEnd, again and again.

        ProtocolError for what is malformed (400), beyond a limit (413), or broken off (400); again at every further call.
        """
        if self._error:
            raise ProtocolError(*self._error)
        try:
            event = None
            while event is None:
                event = self._state(self)
            if event is NEED_DATA:
                if self._over:
                    raise ProtocolError(413, f"multipart: more than {self._max_total} bytes in all (max_total_bytes)")
                if self._ended:
                    raise ProtocolError(400, f"multipart: the body ends {self._where()}")
            return event
        except ProtocolError as error:
            self._error = error.status, error.message
            raise

    def _where(self):
        parser = _MultipartParser
        return {parser._preamble: "before the first boundary (lines end with CRLF)",
                parser._head: f"in the head of part {self._parts}",
                parser._body: f"in part {self._parts}",
                parser._after_last: "in the last boundary"}.get(self._state, f"after part {self._parts}, without `--boundary--`")

    # Each state gives an event, NEED_DATA, or None when it has passed on to another one.

    def _hold(self):
        """Where data end that are no part of a delimiter for sure."""
        buffer, delimiter = self._buffer, self._delimiter
        last = buffer.rfind(b"\r", max(self._at, len(buffer) - len(delimiter) + 1))
        return last if last >= 0 and delimiter.startswith(buffer[last:]) else len(buffer)

    def _preamble(self):
        found = self._buffer.find(self._delimiter, self._at)
        end = found if found >= 0 else self._hold()
        self._skipped += end - self._at
        self._at = end
        if self._skipped > MAX_PREAMBLE:
            raise ProtocolError(400, f"multipart: no boundary in the first {MAX_PREAMBLE} bytes")
        if found < 0:
            return NEED_DATA
        self._at += len(self._delimiter)
        self._state = _MultipartParser._after_delimiter
        return None

    def _padding(self):
        """Pass blanks and CRLF; False if more data are needed to tell."""
        end = _padding_at(self._buffer, self._at, self._at + MAX_PADDING).end()
        follows = self._buffer[end:end + 2]
        if follows == b"\r\n":
            self._at = end + 2
            return True
        if follows not in (b"", b"\r"):
            raise ProtocolError(400, f"multipart: {bytes(follows[:1])!r} after a boundary, expected CRLF or --")
        return False

    def _after_delimiter(self):
        follows = self._buffer[self._at:self._at + 2]
        if follows == b"--":
            self._at += 2
            self._skipped = 0
            self._state = _MultipartParser._after_last
            return None
        if follows == b"-" or not self._padding():
            return NEED_DATA
        if self._parts == self._max_parts:
            raise ProtocolError(413, f"multipart: more than {self._max_parts} parts (max_parts)")
        self._parts += 1
        self._scan = self._at
        self._state = _MultipartParser._head
        return None

    def _head(self):
        end = self._buffer.find(b"\r\n\r\n", self._scan)
        if end < 0:
            self._scan = max(self._at, len(self._buffer) - 3)
        if (end if end >= 0 else len(self._buffer) - 3) - self._at > self._max_head:
            raise ProtocolError(413, f"multipart: the head of part {self._parts} has more than {self._max_head} bytes "
                                     "(max_head_bytes)")
        if end < 0:
            return NEED_DATA
        begin = _part_begin(bytes(self._buffer[self._at:end]), self._parts)
        self._left, self._limit = ((self._max_field, "max_field_bytes") if begin.filename is None else
                                   (self._max_file, "max_file_bytes"))
        self._at = end + 2
        self._prefix = 2
        self._state = _MultipartParser._body
        return begin

    def _body(self):
        found = self._buffer.find(self._delimiter, self._at)
        end = found if found >= 0 else self._hold()
        if end > self._at and self._prefix:
            self._at += 2
            self._prefix = 0
        size = end - self._at
        if size > self._left:
            size = self._left
            if not size:
                raise ProtocolError(413, f"multipart: part {self._parts} is too large ({self._limit})")
        if size:
            data = bytes(memoryview(self._buffer)[self._at:self._at + size])
            self._at += size
            self._left -= size
            return _PartData(data)
        if found < 0:
            return NEED_DATA
        self._at += len(self._delimiter)
        self._state = _MultipartParser._after_delimiter
        return _PartEnd()

    def _after_last(self):
        if self._ended and not self._over and _padding_at(self._buffer, self._at).end() == len(self._buffer) <= (
                self._at + MAX_PADDING):
            self._state = _MultipartParser._done
            return None
        if not self._padding():
            return NEED_DATA
        self._state = _MultipartParser._epilogue
        return None

    def _epilogue(self):
        self._skipped += len(self._buffer) - self._at
        self._at = len(self._buffer)
        if self._skipped > MAX_PREAMBLE:
            raise ProtocolError(400, f"multipart: more than {MAX_PREAMBLE} bytes after the last boundary")
        if not self._ended or self._over:
            return NEED_DATA
        self._state = _MultipartParser._done
        return None

    def _done(self):
        return _FormEnd()


def _part_begin(head, number):
    """The _PartBegin of a part's head. Its lines may be anything between CRLFs, in UTF-8 as browsers send them."""
    pairs = []
    for line in head.split(b"\r\n"):
        found = _part_line(line)
        if not found:
            raise _refused(f"multipart: part {number}, header line", line, "expected `Name: value`")
        pairs.append((found[1].decode("latin-1"), found[2].decode("latin-1").rstrip(" \t")))
    headers = Headers(pairs)
    dispositions, types_ = headers.get_all("content-disposition"), headers.get_all("content-type")
    if len(dispositions) != 1 or len(types_) > 1:
        raise ProtocolError(400, f"multipart: part {number} needs one Content-Disposition, and at most one Content-Type")
    encoding = headers.get("content-transfer-encoding", "binary")
    if encoding.isascii() and encoding.lower() not in ("7bit", "8bit", "binary"):
        raise _refused(f"multipart: part {number}, Content-Transfer-Encoding", encoding, "not for forms (RFC 7578, section 4.7)")
    try:
        disposition = dispositions[0].encode("latin-1").decode()
    except UnicodeDecodeError:
        raise ProtocolError(400, f"multipart: part {number}: its Content-Disposition is no UTF-8") from None
    parameters = _form_parameters(disposition, number)
    if "name" not in parameters:
        raise ProtocolError(400, f"multipart: part {number} has no name")
    return _PartBegin(parameters["name"], parameters.get("filename"), types_[0] if types_ else None, headers)


def _form_parameters(value, number):
    """{name: text} of a form's Content-Disposition, which is not quite that of RFC 9110: browsers quote `"`, CR and LF as %22,
    %0D and %0A (the HTML standard, section 4.10.21.8) and a backslash not at all, others put a backslash before `"` and itself.
    `filename*` is not allowed (RFC 7578 section 4.2), but sent by some clients: it counts where there is no `filename`.
    """
    what = f"multipart: part {number}, Content-Disposition"
    found = _value_at(value)
    if not found or found[0].lower() != "form-data":
        raise _refused(what, value, "expected `form-data; name=…`")
    at, parameters = found.end(), {}
    while at < len(value):
        found = _form_parameter_at(value, at)
        if not found:
            raise _refused(what, value, f"expected `; name=value` at character {at + 1}")
        at = found.end()
        name, token, quoted = found.groups()
        if name is None:
            continue
        name = name.lower()
        if name in parameters:
            raise _refused(what, value, f"parameter {name} comes twice")
        parameters[name] = token if token is not None else _form_escape.sub(
            lambda escape: escape[1] or chr(int(escape[2], 16)), quoted)
    extended = _extended(parameters.pop("filename*", ""))
    if extended is not None:
        parameters.setdefault("filename", extended)
    return parameters


class _FormPart(typing.NamedTuple):
    """A field or a file to send. `content`: str, bytes, or anything that the sender of the body knows how to read.

    With a `filename` it is a file, of application/octet-stream if `content_type` is None. `length` in bytes, of a content that
    is neither str nor bytes, if it is known.
    """

    name: str
    content: object
    filename: str | None = None
    content_type: str | None = None
    length: int | None = None


class _MultipartBody:
    """Makes a multipart/form-data body of _FormPart and (name, content) pairs.

    `content_type` is the value for Content-Type, `length` the number of bytes, None if one part's is not known. Iterate it for
    its pieces: bytes to send, and between them the contents that are neither str nor bytes, for the caller to read and send in
    its own way. `boundary`: a random one if None; otherwise it must occur in no content (ValueError if it does in one that is
    str or bytes). ValueError for a content_type with control characters.
    """

    def __init__(self, parts, *, boundary=None):
        if boundary is None:
            boundary = secrets.token_hex(16)
        elif not _is_boundary(boundary):
            raise ValueError(f"boundary={boundary!r:.80}: {_BOUNDARY}")
        self.content_type = str(MediaType("multipart", "form-data", {"boundary": boundary}))
        self._pieces, self.length, unknown = [], 0, False
        for part in parts:
            part = _FormPart(*part)
            content = part.content.encode() if isinstance(part.content, str) else part.content
            self._add(f"--{boundary}\r\n".encode() + _part_head(part))
            if isinstance(content, (bytes, bytearray, memoryview)):
                content = bytes(content)
                if boundary.encode() in content:
                    raise ValueError(f"part {part.name!r:.80} contains the boundary: choose another one, or none")
                self._add(content)
            else:
                self._pieces.append(content)
                unknown |= part.length is None
                self.length += part.length or 0
            self._add(b"\r\n")
        self._add(f"--{boundary}--\r\n".encode())
        self._pieces = [bytes(piece) if isinstance(piece, bytearray) else piece for piece in self._pieces]
        if unknown:
            self.length = None

    def _add(self, data):
        """What is small is joined to what is before it: a piece is a write."""
        self.length += len(data)
        if len(data) > SMALL_PIECE:
            self._pieces.append(data)
        elif self._pieces and isinstance(self._pieces[-1], bytearray):
            self._pieces[-1] += data
        else:
            self._pieces.append(bytearray(data))

    def __iter__(self):
        return iter(self._pieces)


def _part_head(part):
    def escaped(text):
        text = text.replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")
        if re.search("[\x00-\x08\x0b-\x1f\x7f]", text):
            raise ValueError(f"{text!r:.80}: the name of a field or file in a form has no control characters")
        if re.search(r'\\["\\]|\\$', text):
            text = text.replace("\\", "\\\\")
        return text.encode(errors="replace")
    head = b'Content-Disposition: form-data; name="' + escaped(part.name) + b'"'
    content_type = part.content_type
    if part.filename is not None:
        head += b'; filename="' + escaped(part.filename) + b'"'
        content_type = content_type or "application/octet-stream"
    if content_type is not None:
        if not _is_text(content_type):
            raise ValueError(f"content_type={content_type!r:.80} has control characters")
        head += b"\r\nContent-Type: " + content_type.encode("latin-1")
    return head + b"\r\n\r\n"


# ---- conditional requests and ranges --------------------------------------------------------------------------
# After RFC 9110 chapters 13 and 14. Decisions only: what is sent, and from where, is the caller's affair.

# Ranges of one request; more are as if there were none, as section 17.15 advises. Apache: 200, with a history of trouble.
MAX_RANGES = 16

# Bytes between two ranges that are sent along rather than begin a new part: about what a part's head has (section 15.3.7.2).
RANGE_GAP = 80

_range_set = re.compile(r"[bB][yY][tT][eE][sS]=(.*)").fullmatch
_byte_range = re.compile(r"([0-9]{1,19})-([0-9]{0,19})|-([0-9]{1,19})").fullmatch


class _ByteRange(typing.NamedTuple):
    """Bytes `first` to `last`, both included, counted from 0."""

    first: int
    last: int

    @property
    def length(self):
        """The number of bytes."""
        return self.last - self.first + 1

    def content_range(self, size):
        """The Content-Range value, of a representation of `size` bytes."""
        return f"bytes {self.first}-{self.last}/{size}"


class _Decision(typing.NamedTuple):
    """What to answer: `status` 200 (go on as if nothing had been asked), 206, 304, 412 or 416; `ranges` to send with 206.

    One range is sent with its content_range(); several as _frame_byteranges() says. 416 needs `Content-Range: bytes */size`.
    304 carries the fields that 200 would have had of Cache-Control, Content-Location, Date, ETag, Expires and Vary.
    """

    status: int
    ranges: tuple = ()


def _date_or_none(headers, name, now):
    """The one date of this name; None if there is none, several or no valid one: such a condition is ignored."""
    values = headers.get_all(name)
    if len(values) != 1:
        return None
    try:
        return parse_http_date(values[0], now)
    except ProtocolError:
        return None


def _evaluate(method, headers, *, now, etag=None, last_modified=None, size=None):
    """Which answer the conditions and ranges of a request ask for, where it would be 200 without them. -> _Decision

    `etag` and `last_modified` (timestamp) are those of the representation as it is now, None if it has none; `size`: its bytes,
    None if ranges are not offered. `now`: the timestamp of the answer.
    Order and comparisons are those of RFC 9110 section 13.2.2. ProtocolError for entity tags that are malformed: what they
    should protect is better left as it is. Dates and ranges that are malformed are ignored, as it says.
    """
    if method in ("CONNECT", "OPTIONS", "TRACE"):
        return _Decision(200)
    modified = None if last_modified is None else math.floor(last_modified)
    reading = method in ("GET", "HEAD")
    if "if-match" in headers:
        tags = _parse_entity_tags(headers._combined("if-match"))
        if tags != "*" and (etag is None or not any(_strong_match(etag, tag) for tag in tags)):
            return _Decision(412)
    elif modified is not None and "if-unmodified-since" in headers:
        date = _date_or_none(headers, "if-unmodified-since", now)
        if date is not None and modified > date:
            return _Decision(412)
    if "if-none-match" in headers:
        tags = _parse_entity_tags(headers._combined("if-none-match"))
        if tags == "*" or etag is not None and any(_weak_match(etag, tag) for tag in tags):
            return _Decision(304 if reading else 412)
    elif reading and modified is not None and "if-modified-since" in headers:
        date = _date_or_none(headers, "if-modified-since", now)
        if date is not None and modified <= date:
            return _Decision(304)
    if method == "GET" and size is not None and "range" in headers:
        if "if-range" not in headers or _if_range(headers, etag, modified, now):
            return _ranges_asked(headers.get_all("range"), size)
    return _Decision(200)


def _if_range(headers, etag, modified, now):
    """Whether If-Range holds: it is the representation's entity tag, or exactly its date, and that is a strong validator."""
    values = headers.get_all("if-range")
    if len(values) != 1:
        return False
    value = values[0].strip(" \t")
    if '"' in value:
        return etag is not None and _strong_match(etag, value)
    # Whoever was given a date within the second in which it was modified cannot know what was modified later in that second.
    return modified is not None and modified < math.floor(now) and _date_or_none(headers, "if-range", now) == modified


def _ranges_asked(values, size):
    """The _Decision on Range: 206, 416, or 200 if it is to be ignored: another unit, malformed, too many, nothing to send."""
    found = _range_set(values[0]) if len(values) == 1 else None
    if not found or not size or found[1].count(",") > 4 * MAX_RANGES:
        return _Decision(200)
    wanted = _split_list(found[1])
    if not 0 < len(wanted) <= MAX_RANGES:
        return _Decision(200)
    ranges = []
    for element in wanted:
        one = _byte_range(element)
        if not one:
            return _Decision(200)
        if one[3] is not None:
            first, last = max(0, size - int(one[3])), size - 1
        else:
            first, last = int(one[1]), int(one[2]) if one[2] else size - 1
            if one[2] and last < first:
                return _Decision(200)
        if first < size:
            ranges.append(_ByteRange(first, min(last, size - 1)))
    return _Decision(206, _coalesced(ranges)) if ranges else _Decision(416)


def _coalesced(ranges):
    """The ranges, those that overlap or nearly touch made one, each at the place of the first of those it is made of."""
    groups = []                 # [first, last, place], by first
    for place, (first, last) in sorted(enumerate(ranges), key=lambda item: item[1]):
        if groups and first - groups[-1][1] - 1 <= RANGE_GAP:
            groups[-1][1] = max(groups[-1][1], last)
            groups[-1][2] = min(groups[-1][2], place)
        else:
            groups.append([first, last, place])
    return tuple(_ByteRange(first, last) for first, last, _ in sorted(groups, key=lambda group: group[2]))


class _ByteRangesFrame(typing.NamedTuple):
    """How several ranges are sent: for each of `parts` (head, range) the head and then the bytes, and the `tail` after the last.

    `content_type` and `length` are the values for Content-Type and Content-Length.
    """

    content_type: str
    length: int
    parts: tuple
    tail: bytes


def _frame_byteranges(ranges, size, content_type, boundary):
    """The _ByteRangesFrame of a multipart/byteranges answer. RFC 9110 section 14.6. ValueError for what cannot be a boundary."""
    if not _is_boundary(boundary):
        raise ValueError(f"boundary={boundary!r:.80}: {_BOUNDARY}")
    kind = f"Content-Type: {content_type}\r\n" if content_type else ""
    parts = tuple((f"\r\n--{boundary}\r\n{kind}Content-Range: {one.content_range(size)}\r\n\r\n".encode("latin-1"), one)
                  for one in ranges)
    tail = f"\r\n--{boundary}--\r\n".encode()
    length = sum(len(head) + one.length for head, one in parts) + len(tail)
    return _ByteRangesFrame(str(MediaType("multipart", "byteranges", {"boundary": boundary})), length, parts, tail)


# ---- compression ----------------------------------------------------------------------------------------------
# gzip (RFC 1952) and deflate, which is zlib's format (RFC 1950), but was and is sent raw too (RFC 1951): both are read, and the
# first two bytes tell which it is.

# Bytes that a decoder gives at a time, and takes at a time from what it is given: zlib copies what it has not used.
INFLATED_PIECE, DEFLATED_PIECE = 64 * 2**10, 16 * 2**10

# Bytes that a body may have once it is inflated: a bomb of 64 KiB makes 64 MiB.
MAX_INFLATED = 64 * 2**20

# Content codings of one body, one over the other. Two are seen by mistake; curl allows five.
MAX_CODINGS = 5

# zlib's level: 6, its default, takes twice as long as 4 for a few per cent; nginx has 1.
COMPRESSION_LEVEL = 5

# Bytes below which a response is not compressed: it fits into one segment of TCP anyway, and may grow. nginx: 20, Apache: none.
MIN_COMPRESSED = 860

_is_compressible = re.compile(
    r"text/.*|.*\+(?:json|xml|text)|application/(?:json|javascript|ecmascript|xml|x-javascript|wasm|manifest\+json|x-ndjson|"
    r"rtf|sql|graphql|x-sh|toml|yaml|x-yaml|vnd\.ms-fontobject)|font/(?:ttf|otf|collection)|image/(?:bmp|x-icon)").fullmatch


class _Encoder:
    """Compresses a stream: encode() for each piece, finish() for the rest; flush() when what came so far must get through.

    `coding`: "gzip" or "deflate". All three give bytes to send, maybe none.
    """

    def __init__(self, coding, *, level=COMPRESSION_LEVEL):
        if coding not in ("gzip", "deflate"):
            raise ValueError(f'coding={coding!r:.40}: "gzip" or "deflate"')
        self._zlib = zlib.compressobj(level, zlib.DEFLATED, 31 if coding == "gzip" else 15)

    def encode(self, data):
        """Take a piece."""
        return self._zlib.compress(data)

    def flush(self):
        """All that has been taken so far: the peer can inflate it at once. It costs about 5 bytes each time."""
        return self._zlib.flush(zlib.Z_SYNC_FLUSH)

    def finish(self):
        """The end of the stream. Nothing comes after it."""
        return self._zlib.flush(zlib.Z_FINISH)


class _Decoder:
    """Inflates a stream: decode() for each piece, finish() at the end.

    `codings`: a Content-Encoding value ("gzip", "deflate, gzip", "identity", ""); ProtocolError (415) for one that is not known.
    More than `max_bytes` in any stage are refused with 413 before they are made. Trailing bytes are an error, but for further
    members of gzip; so is a stream that breaks off.
    """

    def __init__(self, codings, *, max_bytes=MAX_INFLATED):
        stages = [coding.removeprefix("x-") for coding in _parse_tokens(codings) if coding != "identity"]
        for coding in stages:
            if coding not in ("gzip", "deflate"):
                raise _refused("Content-Encoding", codings, f"{coding!r:.40} is not known here, only gzip and deflate", 415)
        if len(stages) > MAX_CODINGS:
            raise _refused("Content-Encoding", codings, f"more than {MAX_CODINGS} codings", 415)
        self._stages = [_Stage(coding, max_bytes) for coding in reversed(stages)]

    def decode(self, data):
        """Take a piece. -> iterator of bytes, each at most 64 KiB; it must be exhausted. ProtocolError (400, 413).

        Without a coding it gives the piece as it is, and counts nothing.
        """
        pieces = iter([data] if len(data) else [])
        for stage in self._stages:
            pieces = stage.decode(pieces)
        return pieces

    def finish(self):
        """There is no more. ProtocolError (400) if the stream is not complete; nothing at all is complete."""
        for stage in self._stages:
            stage.finish()


class _Stage:
    """One coding of a _Decoder."""

    def __init__(self, coding, max_bytes):
        self._coding, self._left, self._max = coding, max_bytes, max_bytes
        self._zlib = None           # the decompressor of the stream or member under way
        self._begun = False         # there was one
        self._held = b""            # the beginning of the next one, if it is less than two bytes

    def _begin(self, head):
        if self._coding == "gzip":
            if head != b"\x1f\x8b":
                raise ProtocolError(400, f"gzip: {head!r} " + ("follows its end" if self._begun else "is no beginning of it"))
            return zlib.decompressobj(31)
        if self._begun:
            raise ProtocolError(400, f"deflate: {head!r} follows its end")
        wrapped = head[0] & 15 == 8 and head[0] >> 4 <= 7 and int.from_bytes(head, "big") % 31 == 0
        return zlib.decompressobj(15 if wrapped else -15)

    def decode(self, pieces):
        for piece in pieces:
            for at in range(0, len(piece), DEFLATED_PIECE):
                yield from self._inflate(bytes(piece[at:at + DEFLATED_PIECE]))

    def _inflate(self, data):
        data, self._held = self._held + data, b""
        while True:
            if self._zlib is None:
                if len(data) < 2:
                    self._held = data
                    return
                self._zlib, self._begun = self._begin(data[:2]), True
            limit = min(INFLATED_PIECE, self._left + 1)
            try:
                out = self._zlib.decompress(data, limit)
            except zlib.error as error:
                raise ProtocolError(400, f"{self._coding}: the data are corrupt ({error})") from None
            self._left -= len(out)
            if self._left < 0:
                raise ProtocolError(413, f"{self._coding}: more than {self._max} bytes once inflated (max_bytes)")
            data, done = self._zlib.unconsumed_tail, not self._zlib.unconsumed_tail and len(out) < limit
            if self._zlib.eof:
                data, self._zlib, done = self._zlib.unused_data, None, False
            if out:
                yield out
            if done:                    # else zlib may have more in hand, also without more input
                return

    def finish(self):
        if self._zlib is not None or self._held:
            raise ProtocolError(400, f"{self._coding}: the stream breaks off")


def _choose_compression(accept_encoding, status, headers, length=None, *, min_bytes=MIN_COMPRESSED):
    """Whether a response is to be compressed. -> (coding or None, whether it depends on Accept-Encoding).

    `headers` are the response's, `length` the bytes of its content, None if it is streamed. Not: what is small, encoded, partial
    (206) or has no content; types that are compressed in themselves; with Cache-Control: no-transform. Where the second is True
    the response needs `Vary: Accept-Encoding` even if it is not compressed: _compressed_headers() does it all.

    Do not compress what holds a secret next to something that the client can choose (BREACH): leave such routes out.
    """
    if status < 200 or status in (204, 205, 206, 304) or "content-encoding" in headers or "content-range" in headers:
        return None, False
    if length is not None and length < min_bytes:
        return None, False
    if not _is_compressible(_essence(headers)):
        return None, False
    try:
        if "no-transform" in _parse_cache_control(headers._combined("cache-control")):
            return None, False
    except ProtocolError:               # what a handler has written is not ours to repair
        return None, False
    coding = negotiate_encoding(accept_encoding)
    return (None if coding == "identity" else coding), True


def _add_vary(headers, *names):
    """Have Vary name these, if it does not."""
    lines = headers.get_all("vary")
    named = {name.lower() for name in _parse_list(",".join(lines))}
    missing = [name for name in names if name.lower() not in named]
    if missing and "*" not in named:
        headers.set("Vary", ", ".join([*lines, *missing]))


def _compressed_headers(headers, coding, depends=True):
    """Change a response's headers for what _choose_compression() has decided.

    Vary says that it depends on Accept-Encoding. With a coding: Content-Encoding is set, Content-Length and Accept-Ranges go,
    and the entity tag becomes weak, as it is no longer of the same bytes.
    """
    if depends:
        _add_vary(headers, "Accept-Encoding")
    if coding is None:
        return
    headers.set("content-encoding", coding)
    for name in ("content-length", "accept-ranges"):
        headers.remove(name)
    etag = headers.get("etag")
    if etag is not None and not etag.startswith("W/"):
        headers.set("etag", f"W/{etag}")


# ---- codec ----------------------------------------------------------------------------------------------------
#
# RFC 9112 without I/O: bytes go in, events come out (receive_data(), next_event()); events go in, bytes come out (send()).
# One HttpConnection is one end of one connection. It holds what has been received and not yet been read, never a body.
#
# A head is read in one of two ways. The short way is for a head that is there in one piece: found by one bytes.find, decoded
# once, split once, its lines looked up in a table. It only ever *accepts*: what it does not like, whatever it is, it leaves as
# it was to the long way, which goes line by line as the bytes come. (So does receive_known(), which a server may ask first.) So
# there is one place that says what is wrong, and it says the same however the bytes were split, because it looks at them in their
# order:
#
#     C1  an error depends on the bytes up to the one that makes it one, never on how many more are there
#     C2  what is before an error is delivered first: the events of the bytes before it
#     C3  every byte is looked at a bounded number of times: `_scan` is how far the current line has been searched
#     C4  _start <= _scan, and what is before _start is gone for good
#     C5  what becomes known was accepted on this connection, under its limits, and asks for nothing but what _begin() has set:
#         HTTP/1.1, keep-alive, no switch, no Expect; its content has a length. So receive_known() sets the method and the states
#         only, and has to check what may be another one: the first line, the length, and the limits of both
#
# Both sides' states change by one table, _TRANSITIONS: (whose state, state, what happens) -> state. Nothing else sets them.

CLIENT, SERVER = "client", "server"

# The states of each side; both begin as IDLE, and again with the next cycle.
IDLE, SEND_RESPONSE, SEND_BODY = "IDLE", "SEND_RESPONSE", "SEND_BODY"
DONE, MUST_CLOSE, CLOSED, ERROR = "DONE", "MUST_CLOSE", "CLOSED", "ERROR"
MIGHT_SWITCH, SWITCHED = "MIGHT_SWITCH", "SWITCHED"

# What happens. A request moves both sides; the others the one whose they are.
_REQUEST, _INFORM, _RESPOND, _DATA, _END, _WHOLE = "request", "1xx", "response", "data", "end", "a whole message"
_ASK, _ACCEPT, _DECLINE = "end, and a wish to switch", "the switch", "no switch"
_LAST, _NEXT, _CLOSE, _FAIL = "no keep-alive", "the next cycle", "the end of the connection", "an error"

_OVER = {_LAST: MUST_CLOSE, _CLOSE: CLOSED, _FAIL: ERROR}
_TRANSITIONS = {
    CLIENT: {
        IDLE: {_REQUEST: SEND_BODY, **_OVER},               # (the last cycle: they are answered before they ask, with 408)
        SEND_BODY: {_DATA: SEND_BODY, _END: DONE, _ASK: MIGHT_SWITCH, _FAIL: ERROR},
        MIGHT_SWITCH: {_ACCEPT: SWITCHED, _DECLINE: DONE, _FAIL: ERROR},
        DONE: {_NEXT: IDLE, **_OVER},
        MUST_CLOSE: _OVER, CLOSED: {_CLOSE: CLOSED}, SWITCHED: {}, ERROR: {_FAIL: ERROR},
    },
    SERVER: {
        IDLE: {_REQUEST: SEND_RESPONSE, _RESPOND: SEND_BODY, _WHOLE: DONE, **_OVER},        # (to what is no request: 400)
        SEND_RESPONSE: {_INFORM: SEND_RESPONSE, _RESPOND: SEND_BODY, _WHOLE: DONE, _ACCEPT: SWITCHED, _FAIL: ERROR},
        SEND_BODY: {_DATA: SEND_BODY, _END: DONE, _FAIL: ERROR},
        DONE: {_NEXT: IDLE, **_OVER},
        MUST_CLOSE: _OVER, CLOSED: {_CLOSE: CLOSED}, SWITCHED: {}, ERROR: {_FAIL: ERROR},
    },
}

# In these nothing more is read; and in these a client may come to another request.
_DEAF, _LIVELY = frozenset([MUST_CLOSE, CLOSED, ERROR]), frozenset([SEND_BODY, MIGHT_SWITCH, DONE])


class _Sign:
    """A thing that is only itself."""

    __slots__ = ("name",)

    def __init__(self, name):
        self.name = name

    def __repr__(self):
        return self.name


# Of next_event(): give it more by receive_data() or receive_end(); nothing more will come before the next cycle, or the switch.
NEED_DATA, PAUSED = _Sign("NEED_DATA"), _Sign("PAUSED")


class RequestHead:
    """A request's method, target and headers. To send: `headers` are pairs or Headers, with exactly one Host.

    Received: `headers` are Headers, `version` is "1.0" or "1.1". The target is as received: origin-form (/path?query),
    absolute-form (http://host/path?query), authority-form (host:port; CONNECT) or asterisk-form (*; OPTIONS).
    """

    __slots__ = ("method", "target", "headers", "version")

    def __init__(self, method, target, headers=(), version="1.1"):
        self.method, self.target, self.headers, self.version = method, target, headers, version

    @property
    def authority(self):
        """host[:port] that the request is for: of the target, if it has one (RFC 9112 3.2.2: then Host counts for nothing)."""
        if self.method == "CONNECT":
            return self.target
        found = _ABSOLUTE.fullmatch(self.target)
        headers = self.headers if isinstance(self.headers, Headers) else Headers(self.headers)
        return found[2] if found else headers.get("host", "")

    @property
    def path(self):
        """Path and query of the target; "*" or "" if it has none."""
        if self.method == "CONNECT":
            return ""
        found = _ABSOLUTE.fullmatch(self.target)
        if found is None:
            return self.target
        return found[3] if found[3][:1] == "/" else "*" if self.method == "OPTIONS" and not found[3] else "/" + found[3]

    def __repr__(self):
        return f"RequestHead({self.method!r}, {self.target!r}, {self.headers!r}, {self.version!r})"


class ResponseHead:
    """A response's status (200 to 999) and headers, pairs or Headers. `reason`: None for the usual one.

    Received: `headers` are Headers, `version` is "1.0" or "1.1", and `reason` is what came, perhaps "".
    """

    __slots__ = ("status", "headers", "reason", "version")

    def __init__(self, status, headers=(), reason=None, version="1.1"):
        self.status, self.headers, self.reason, self.version = status, headers, reason, version

    def __repr__(self):
        return f"{type(self).__name__}({self.status!r}, {self.headers!r}, {self.reason!r}, {self.version!r})"


class InformationalResponse(ResponseHead):
    """A response before the response: 100 Continue, 103 Early Hints; 101 Switching Protocols is the last one."""

    __slots__ = ()


class Data:
    """Some of the content: `data`. Received: bytes, at least one, as they came; they say nothing about chunks."""

    __slots__ = ("data",)

    def __init__(self, data):
        self.data = data

    def __repr__(self):
        return f"Data({self.data!r})"


class EndOfMessage:
    """The message is complete. `trailers`: Headers (to send: or pairs) of its trailer section, or None if it has none."""

    __slots__ = ("trailers",)

    def __init__(self, trailers=None):
        self.trailers = trailers

    def __repr__(self):
        return f"EndOfMessage({self.trailers!r})"


class ConnectionClosed:
    """The peer has ended, and between two messages. It will send nothing more; it may still read."""

    __slots__ = ()

    def __repr__(self):
        return "ConnectionClosed()"


_PLAIN_END, _CONNECTION_CLOSED = EndOfMessage(), ConnectionClosed()
_new = object.__new__

# A target is printable ASCII. `#` would begin a fragment, which is never sent; `"`, `<` and `>` no URL has (the others that RFC
# 3986 forbids, such as `|` and `[` in a query, browsers do send).
_TARGET_CHARS = r"!$-;=?-~"
_FIRST_LINE = re.compile(rf"([{_TOKEN_CHARS}]+) ([\x21-\x7e]+) HTTP/([0-9])\.([0-9])")
_ORIGIN = re.compile(rf"/[{_TARGET_CHARS}]*")
_ABSOLUTE = re.compile(rf"([Hh][Tt][Tt][Pp][Ss]?)://([^/?#@]+)((?:[/?][{_TARGET_CHARS}]*)?)")

# What nearly every request begins with. The rest takes the long way: CONNECT, other methods, targets, versions.
_USUAL_LINE = re.compile(rf"(GET|HEAD|POST|PUT|PATCH|DELETE|OPTIONS) (/[{_TARGET_CHARS}]*) HTTP/1\.([01])")
_usual_line = _USUAL_LINE.fullmatch

# The space after the status is there even without a reason (RFC 9112 4), but not every server knows.
_STATUS_LINE = re.compile(rf"HTTP/([0-9])\.([0-9]) ([1-9][0-9][0-9])(?: ([{_VALUE_CHARS}]*))?")
_STATUS_START = b"HTTP/"

# A chunk's size, and what may follow it (RFC 9112 7.1.1) but for the whitespace that is called bad there. What repeats is
# possessive (*+): each part begins with what the one before cannot hold, so there is nothing to go back for.
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,16})\r\n")
_CHUNK_LINE = re.compile(
    rf"([0-9A-Fa-f]{{1,16}})(?:;[{_TOKEN_CHARS}]++(?:=(?:[{_TOKEN_CHARS}]++"
    r'|"(?:[\t \x21\x23-\x5b\x5d-\x7e\x80-\xff]++|\\[\t\x20-\x7e\x80-\xff])*+"))?)*+')

_TOKEN_BYTES = frozenset(byte for byte in range(128) if _is_token(chr(byte)))

# How the end of a content is known; and where in a chunked one we are.
_BY_LENGTH, _BY_CLOSE, _BY_CHUNKS, _DROPPED = "length", "close", "chunks", "dropped"
_NO_OPTIONS = frozenset()
_SIZE, _INSIDE, _AFTER, _TRAILERS = "size", "inside", "after", "trailers"


def _request_line(line):
    """(method, target, minor version) of a request line; ProtocolError 400, 505."""
    found = _FIRST_LINE.fullmatch(line)
    if found is None:
        raise ProtocolError(400, f"{_shown(line)} is no request line: method, target, HTTP/1.1, with single spaces between")
    method, target, major, minor = found.groups()
    if major != "1":
        raise ProtocolError(505, f"this is HTTP/1.1, and not HTTP/{major}.{minor}")
    problem = _target_problem(method, target)
    if problem:
        raise ProtocolError(400, f"{_shown(target)} {problem}")
    return method, target, int(minor)


def _target_problem(method, target):
    """None if it is a target for that method (RFC 9112 3.2), or what is wrong."""
    if method == "CONNECT":
        found = _AUTHORITY.fullmatch(target)
        return None if found and found[2] and not _authority_problem(target) else "is no host:port, and CONNECT takes that"
    if _ORIGIN.fullmatch(target) or (target == "*" and method == "OPTIONS"):
        return None
    found = _ABSOLUTE.fullmatch(target)
    if found is None:
        return "is no target: /path, http://host/path, or * for OPTIONS"
    problem = _authority_problem(found[2])
    return problem and f"has an authority that {problem}"


@_known
def _option_set(value):
    """The lower-case tokens of a list. (They are few, and repeat: 0.04 µs instead of 0.5.)"""
    return frozenset(option.lower() for option in _split_list(value))


def _repeated(entries):
    """What is wrong if something is there more than once that must not be, else None."""
    names = [entry[0] for entry in entries]
    for name in _ONCE:
        if names.count(name) > 1:
            return f"{name} is there {names.count(name)} times, and once is allowed"
    return None


class _Received:
    """What has been received, and is to be read."""

    __slots__ = ("role", "our_state", "their_state", "method", "keep_alive", "expects_continue", "upgrade", "max_body",
                 "_our_moves", "_their_moves", "_our_end", "_their_end", "_awaits", "_minor",
                 "_max_first", "_max_field", "_max_fields", "_max_head", "_max_chunk_line", "_least_line",
                 "_buffer", "_start", "_scan", "_ended", "_error", "_fields", "_unlike", "_again",
                 "_first", "_entries", "_head_size", "_blank",
                 "_mode", "_left", "_stage", "_body_size",
                 "_out_mode", "_out_left")

    def receive_data(self, data):
        """What the peer has sent next, bytes, at least one. Call next_event() until it gives NEED_DATA or PAUSED.

        Nothing bounds what is given while it is PAUSED: do not read from the peer then (but to learn that it is gone).
        """
        if type(data) is not bytes:
            data = bytes(data)
        if self._ended or not data:
            raise LocalProtocolError("receive_data() after receive_end()" if self._ended else
                                     "receive_data() without data; receive_end() says that there is no more")
        if self._start == len(self._buffer):
            self._buffer, self._start, self._scan = data, 0, 0
        elif self.their_state not in _DEAF:
            if type(self._buffer) is bytes:             # what is appended to is a bytearray: bytes would be copied each time
                self._buffer = bytearray(self._buffer)
            if self._start:
                del self._buffer[:self._start]
                self._scan, self._start = max(0, self._scan - self._start), 0
            self._buffer += data

    def receive_end(self):
        """The peer will send no more."""
        self._ended = True

    @property
    def trailing_data(self):
        """What has been received and not been read, bytes: after the switch it belongs to the next protocol."""
        return bytes(memoryview(self._buffer)[self._start:])

    def _forget(self):
        self._buffer, self._start, self._scan = b"", 0, 0

    def _no_keep_alive(self):
        """This is the last cycle; of a side that is through with it, for good."""
        self.keep_alive = False
        if self.our_state is DONE:
            self.our_state = self._our_moves[DONE][_LAST]
        if self.their_state is DONE:
            self.their_state = self._their_moves[DONE][_LAST]

    def _more(self, where):
        """NEED_DATA, unless there will be none."""
        if self._ended:
            raise ProtocolError(400, f"the peer ended in the middle of {where}")
        return NEED_DATA

    def _take_line(self, limit, status, what):
        """The next line without its CRLF, or None while it is incomplete. `limit`: bytes; `status`, `what`: if it has more."""
        buffer, start = self._buffer, self._start
        bound = start + limit + 1               # the first place where its end may not be any more
        cr = buffer.find(b"\r", self._scan, bound)
        if buffer.find(b"\n", self._scan, bound if cr < 0 else cr) >= 0:
            raise ProtocolError(400, f"{what}: a line feed without a carriage return before it")
        if cr < 0:
            if len(buffer) >= bound:
                raise ProtocolError(status, f"{what} takes more than the {limit} bytes that are left to it")
            self._scan = len(buffer)
            return None
        if cr + 1 == len(buffer):
            self._scan = cr
            return None
        if buffer[cr + 1] != 10:
            raise ProtocolError(400, f"{what}: a carriage return without a line feed after it")
        self._start = self._scan = cr + 2
        return buffer[start:cr].decode("latin-1")


# What repeats is read once. The requests of a connection mostly have the same field lines, cookies and all, because a client says
# the same of itself each time (HTTP/2 has HPACK for that). So a connection keeps the last ones, and knows the same bytes again by
# one comparison; the length of the content may be another one. First lines repeat among all connections, and are kept for all:
# bytes -> _KnownLine. A request that came with its content in one read is then received by receive_known(), in one step. What is
# kept for all has no secrets, and has come twice; what a connection keeps is given up when it has nothing to do for a while.
_KNOWN_LINES = {}
_known_line = _KNOWN_LINES.get
_SEEN = [None] * 1024           # hashes of first lines that have come
_RECEIVED_KNOWN = (_TRANSITIONS[SERVER][IDLE][_REQUEST], _TRANSITIONS[CLIENT][_TRANSITIONS[CLIENT][IDLE][_REQUEST]][_END])


class _KnownLine:
    """A request line in origin-form, of HTTP/1.1, for good. `query`: the Fields of the query, once somebody has asked."""

    __slots__ = ("method", "target", "raw_path", "query_string", "query")

    def __init__(self, method, target):
        self.method, self.target, self.query = method, target, None
        self.raw_path, _, self.query_string = target.partition("?")


def _read_usual_line(line):
    """The _KnownLine of a request line, bytes; it is kept if it has come before. None for what takes the long way."""
    found = _usual_line(line.decode("latin-1"))
    if found is None or found[3] == "0":
        return None
    known = _KnownLine(found[1], found[2])
    if len(line) <= KNOWN_LINE:
        place = hash(line) % len(_SEEN)
        if _SEEN[place] != hash(line):
            _SEEN[place] = hash(line)
        elif not _is_secret(urllib.parse.unquote(found[2]).lower()):        # (names in a query may be percent-encoded)
            if len(_KNOWN_LINES) >= KNOWN_LINES:
                _KNOWN_LINES.clear()
            _KNOWN_LINES[line] = known
    return known


class _KnownFields:
    """The field lines of a usual request, for good: `entries` is a tuple, so whoever changes its Headers makes a list of his own.

    `lines`: as they came, from the CRLF before the first to the empty line; `size`: bytes of the content; `cookies`: what they
    say, once somebody has asked.
    """

    __slots__ = ("lines", "entries", "index", "size", "cookies", "around")

    def __init__(self, lines, entries, index, size, cookies=None):
        self.lines, self.entries, self.index, self.size, self.cookies = lines, entries, index, size, cookies
        self.around = None          # what stands before and after the digits of Content-Length, once that was needed

    def at(self, data, at):
        """These, or the same with another length, if they are what stands in `data` from there; else None."""
        if data.startswith(self.lines, at):
            return self
        length = self.index.get("content-length")
        if length is None:
            return None
        if self.around is None:
            name, digits = map(str.encode, length)
            begin = self.lines.index(digits, self.lines.index(b"\r\n%b:" % name) + len(name) + 3)
            self.around = self.lines[:begin], self.lines[begin + len(digits):]
        before, after = self.around
        if not data.startswith(before, at):
            return None
        begin = at + len(before)
        end = data.find(after, begin, begin + 18 + len(after))      # (18 digits at most: _length_problem())
        digits = data[begin:end]
        if end < 0 or not digits.isdigit():
            return None
        entry = "content-length", (length[0], digits.decode())
        entries = tuple([entry if other[0] == "content-length" else other for other in self.entries])
        return _KnownFields(before + digits + after, entries, {**self.index, entry[0]: entry[1]}, int(digits), self.cookies)


class _Heads(_Received):
    """Heads: bytes to events, and what they say of the connection."""

    __slots__ = ()

    def _head(self):
        if self._entries is None:               # the long way has not begun
            buffer, start = self._buffer, self._start
            end = buffer.find(b"\r\n\r\n", start, start + self._max_head + 4)
            if end >= 0:
                text = buffer[start:end].decode("latin-1")
                event = self._short_way(text)
                if event is not None:
                    self._start = self._scan = end + 4
                    if not start and self.role is SERVER:
                        self._remember(buffer, end + 4, event)
                    return event
            elif start == len(buffer):
                return self._nothing() if self._ended else NEED_DATA
            self._entries = []
        return self._long_way()

    def _nothing(self):
        """The peer has ended before it sent anything of a head."""
        if self.role is CLIENT:
            raise ProtocolError(400, "the peer ended without a response")
        self.their_state = self._their_moves[self.their_state][_CLOSE]
        return _CONNECTION_CLOSED

    def _short_way(self, text):
        """The event of a whole head, without its last two CRLF, or None if anything about it is odd."""
        lines, server = text.split("\r\n"), self.role is SERVER
        found = _usual_line(lines[0]) if server else _STATUS_LINE.fullmatch(lines[0])
        if (found is None or len(lines) > self._max_fields + 1 or (len(text) > self._least_line and self._too_long(lines))
                or not server and found[1] != "1"):
            return None
        del lines[0]
        try:
            entries = list(map(_received, lines))
        except ProtocolError:
            return None
        if not server:
            return self._response(found, entries)
        method, target, minor = found.groups()
        return self._request(method, target, minor != "0", entries)

    def _remember(self, data, end, head):
        """Have receive_known() know the field lines of a request of the usual kind, which ends there but for its content."""
        if self._unlike > MAX_UNLIKE:
            self._fields, self._unlike = None, (self._unlike + 1) % RETRY_UNLIKE
            return
        at, fields = data.find(b"\r\n"), self._fields
        if fields is not None and (fields := fields.at(data, at)) is not None:
            self._fields, self._unlike = fields, 0
            return
        self._unlike += 1                       # the first is not kept: it may be the only one
        headers = head.headers                  # (Content-Length may have 17 digits more when it comes again)
        if (self._unlike > 1 and end - at <= min(KNOWN_FIELDS, self._max_field - 17) and self._mode is _BY_LENGTH
                and self.keep_alive and self._minor and self._their_end is _END and "expect" not in headers._index):
            self._fields = _KnownFields(bytes(data[at:end]), tuple(headers._entries), headers._index, self._left)

    def receive_known(self, data, most=sys.maxsize):
        """(server) What is known of data that are a whole request and nothing else, whose field lines came before: a tuple of its
        _KnownLine, its _KnownFields, its content (`most` bytes at most) and the data; it is then received to its end. None:
        receive_data() has to look.
        """
        fields, known = self._fields, self._again
        if (fields is None or self.their_state is not IDLE or self._start != len(self._buffer)
                or self._entries is not None):          # which are the first lines of another head
            return None
        if known is None or data != known[3]:           # else the very same comes again, as of who polls: 0.3 µs less
            at = data.find(b"\r\n")
            if not data.startswith(fields.lines, at) and (fields := fields.at(data, at)) is None:      # (mostly without the call)
                return None
            end = at + len(fields.lines)
            if (len(data) - end != fields.size or fields.size > most or at > self._max_first or end - 4 > self._max_head
                    or self.max_body is not None and fields.size > self.max_body):
                return None
            first = data[:at]
            line = _known_line(first) or _read_usual_line(first)
            if line is None:
                return None
            known = line, fields, data[end:], data
            self._fields, self._unlike, self._again = fields, 0, None if fields.size else known
        self.method = known[0].method
        self.our_state, self.their_state = _RECEIVED_KNOWN
        return known

    def forget_fields(self):
        """Keep nothing for the next request. At any time, by another worker too: who needs what is kept reads it once."""
        self._fields = self._again = None       # a _KnownFields; what receive_known() said last of a request without content
        self._unlike = 0                        # heads in a row that were not known

    def _too_long(self, lines):
        return len(lines[0]) > self._max_first or max(map(len, lines)) > self._max_field

    def _long_way(self):
        """The event of a head line by line, as it comes."""
        client = self.role is CLIENT
        while True:
            if self._first is None:
                if self._start == len(self._buffer):
                    return self._nothing() if self._ended else NEED_DATA
                self._check_start(client)
                limit, status, what = self._max_first, 414, "the status line" if client else "the request line"
            else:
                limit, status, what = self._max_field, 431, "a field line"
            left = max(0, self._max_head - self._head_size)
            if left < limit:
                limit, status, what = left, 431, "the head"
            line = self._take_line(limit, status, what)
            if line is None:
                return self._more("a head")
            if not line and self._first is None and not self._blank:
                self._blank = True              # RFC 9112 2.2: one empty line before a request is to be ignored
                continue
            self._head_size += len(line) + 2
            if self._first is None:
                self._first = self._read_status_line(line) if client else _request_line(line)
            elif line:
                self._add_line(line)
            else:
                first, entries = self._first, self._entries
                self._first = self._entries = None
                self._head_size = 0
                return self._response(first, entries) if client else self._request(*first, entries)

    def _check_start(self, client):
        """What is no HTTP at all is refused by its first bytes: a TLS handshake, say, has no line to wait for."""
        if client:
            for byte, right in zip(self._buffer[self._start:self._start + len(_STATUS_START)], _STATUS_START):
                if byte != right:
                    raise ProtocolError(400, f"the byte 0x{byte:02x} where {_STATUS_START.decode()} has to be")
        elif (byte := self._buffer[self._start]) not in _TOKEN_BYTES and byte not in b"\r\n":
            raise ProtocolError(400, f"no request begins with the byte 0x{byte:02x}; is it TLS, or another protocol?")

    @staticmethod
    def _read_status_line(line):
        found = _STATUS_LINE.fullmatch(line)
        if found is None:
            raise ProtocolError(400, f"{_shown(line)} is no status line")
        if found[1] != "1":
            raise ProtocolError(505, f"this is HTTP/1.1, and not HTTP/{found[1]}.{found[2]}")
        return found

    def _add_line(self, line):
        """One more field line of a head or trailer section."""
        if len(self._entries) == self._max_fields:
            raise ProtocolError(431, f"there are more than {self._max_fields} field lines")
        self._entries.append(_received(line))

    def _request(self, method, target, minor, entries):
        """The event of a request whose head is complete, and what follows from it for the connection."""
        self.method, self._minor = method, minor
        index = dict(entries)
        if len(index) != len(entries):
            if problem := _repeated(entries):
                raise ProtocolError(400, problem)
            index = dict(reversed(entries))
        headers = _new(Headers)                         # (Headers._of() takes 0.05 µs more)
        headers._entries, headers._index = entries, index
        if "host" not in index and minor:
            raise ProtocolError(400, "there is no Host")
        keep_alive, self._mode, self._left = minor > 0, _BY_LENGTH, 0
        content = "transfer-encoding" in index or "content-length" in index
        if content:
            self._frame(index, minor)
            self.expects_continue = ("expect" in index and minor > 0 and (self._mode is _BY_CHUNKS or self._left > 0)
                                     and "100-continue" in _option_set(headers._combined("expect")))
        if "connection" in index:
            options = _option_set(index["connection"][1] if len(index) == len(entries) else
                                  headers._combined("connection"))
            keep_alive = "close" not in options and (minor > 0 or "keep-alive" in options)
            if "upgrade" in options and minor and "upgrade" in index:
                self.upgrade = tuple(_split_list(headers._combined("upgrade")))
        if self.upgrade or method == "CONNECT":
            if content and method == "CONNECT":
                raise ProtocolError(400, "a CONNECT has no content, so neither Content-Length nor Transfer-Encoding")
            self._their_end = _ASK
        self.keep_alive = keep_alive
        self.their_state = self._their_moves[self.their_state][_REQUEST]
        self.our_state = self._our_moves[self.our_state][_REQUEST]
        return RequestHead(method, target, headers, "1.1" if minor else "1.0")

    def _response(self, found, entries):
        """The event of a response whose head is complete, and what follows from it for the connection."""
        status, minor = int(found[3]), int(found[2])
        index = dict(entries)
        if len(index) != len(entries):
            if problem := _repeated(entries):
                raise ProtocolError(400, problem)
            index = dict(reversed(entries))
        headers = Headers._of(entries, index)
        version, reason = "1.1" if minor else "1.0", found[4] or ""
        if status < 200:
            if status == 101:
                self._check_switch(headers)
                self._switch()
            return InformationalResponse(status, headers, reason, version)
        if self.method == "CONNECT" and status < 300:
            self._end_is_implied()
            self._switch()
            return ResponseHead(status, headers, reason, version)
        empty = self.method == "HEAD" or status == 204 or status == 304
        if "transfer-encoding" in index or "content-length" in index:
            self._frame(index, minor, limited=not empty)
        else:
            self._mode, self._left = _BY_CLOSE, sys.maxsize if self.max_body is None else self.max_body
        if empty:
            self._mode, self._left = _BY_LENGTH, 0
        options = _NO_OPTIONS
        if "connection" in index:
            options = _option_set(index["connection"][1] if len(index) == len(entries) else
                                  headers._combined("connection"))
        if self._mode is _BY_CLOSE or "close" in options or (not minor and "keep-alive" not in options):
            self.keep_alive = False
        self._decline()
        self.their_state = self._their_moves[self.their_state][_RESPOND]
        return ResponseHead(status, headers, reason, version)

    def _check_switch(self, headers):
        self._end_is_implied()
        offered = {protocol.lower() for protocol in self.upgrade}
        chosen = _option_set(headers._combined("upgrade"))
        if self.our_state is not MIGHT_SWITCH or self.method == "CONNECT":
            raise ProtocolError(400, "the peer switches protocols, and was not asked to")
        if not chosen or not chosen <= offered:
            raise ProtocolError(400, f"the peer switches to {sorted(chosen)}, and was offered {sorted(offered)}")

    def _end_is_implied(self):
        """The end of a request without content takes no bytes: the peer may know of it before we have said so."""
        if self.our_state is SEND_BODY and self._out_mode is _BY_LENGTH and not self._out_left:
            self.our_state = self._our_moves[SEND_BODY][self._our_end]

    def _switch(self):
        """Both sides speak another protocol from here on."""
        if self.our_state is not MIGHT_SWITCH and self.their_state is not MIGHT_SWITCH:
            raise ProtocolError(400, "the peer switches protocols before our request is complete")
        self.our_state = self._our_moves[self.our_state][_ACCEPT]
        self.their_state = self._their_moves[self.their_state][_ACCEPT]

    def _decline(self):
        """A final response: no switch, whatever was asked for."""
        self._our_end = self._their_end = _END
        if self.our_state is MIGHT_SWITCH:
            self.our_state = self._our_moves[MIGHT_SWITCH][_DECLINE]
        if self.their_state is MIGHT_SWITCH:
            self.their_state = self._their_moves[MIGHT_SWITCH][_DECLINE]
        if not self.keep_alive:
            self._no_keep_alive()

    def _frame(self, index, minor, limited=True):
        """How the content is delimited (RFC 9112 6.3), by one field alone."""
        if "transfer-encoding" not in index:
            self._mode, self._left = _BY_LENGTH, int(index["content-length"][1])
            if limited and self.max_body is not None and self._left > self.max_body:
                raise ProtocolError(413, f"a content of {self._left} bytes; {self.max_body} are allowed")
        elif "content-length" in index:
            raise ProtocolError(400, "Transfer-Encoding and Content-Length at once: each says where the message ends")
        elif not minor:
            raise ProtocolError(400, "Transfer-Encoding in HTTP/1.0, which has none")
        else:
            self._mode, self._left, self._stage, self._body_size = _BY_CHUNKS, 0, _SIZE, 0


class _Incoming(_Heads):
    """What the peer sends: bytes to events."""

    __slots__ = ()

    def next_event(self):
        """The next event of what has been received, or NEED_DATA or PAUSED.

        ProtocolError: the peer does not speak HTTP, or too much of it; a server answers that if it still can (our_state is
        IDLE or SEND_RESPONSE), and closes. From then on each call raises it.
        """
        state = self.their_state
        try:
            if state is SEND_BODY:
                return self._content()
            if state is self._awaits:
                return self._head()
            return self._between(state)
        except ProtocolError as error:
            if self.role is CLIENT:
                error.status = 502
            self._fail(error)
            raise

    def _between(self, state):
        """next_event() where there is nothing to read."""
        if state is ERROR:
            raise ProtocolError(*self._error)
        if state is MIGHT_SWITCH or state is SWITCHED:
            return PAUSED
        if state in _DEAF:
            self._forget()
        elif self._start < len(self._buffer):
            if state is not DONE:               # a client that has asked for nothing
                raise ProtocolError(400, "a response came, and there was no request")
            return PAUSED
        if not self._ended:
            return NEED_DATA
        self.their_state = self._their_moves[state][_CLOSE]
        return _CONNECTION_CLOSED

    def _fail(self, error):
        self.their_state = self._their_moves[self.their_state][_FAIL]
        self._error = error.status, error.message       # not the error: its frames have us, and it would be garbage of a cycle
        self._no_keep_alive()
        self._forget()

    def _content(self):
        mode, left = self._mode, self._left
        if mode is _BY_CHUNKS:
            return self._chunks()
        if not left and mode is _BY_LENGTH:
            return self._complete(_PLAIN_END)
        buffer, start = self._buffer, self._start
        size = len(buffer) - start
        if not size:
            if mode is _BY_CLOSE and self._ended:
                return self._complete(_PLAIN_END)
            return self._more("a content")
        if not left:
            raise ProtocolError(413, f"a content of more than {self.max_body} bytes")
        return Data(self._take(min(size, left)))

    def receive_content(self):
        """All that is left of a content that has a length, and its end, if they are here; None: next_event() gives what is."""
        size = self._left
        if self.their_state is not SEND_BODY or self._mode is not _BY_LENGTH or len(self._buffer) - self._start < size:
            return None
        data = self._take(size)
        self._complete(_PLAIN_END)
        return data

    def _take(self, size):
        """The next `size` bytes of the content, bytes: what was received itself if that is all of it, else a copy."""
        self._left -= size
        self.expects_continue = False
        buffer, start = self._buffer, self._start
        if not start and size == len(buffer):
            self._forget()
            return bytes(buffer)                # (the same object, if it is bytes)
        self._start = self._scan = start + size
        with memoryview(buffer) as view:
            return bytes(view[start:start + size])

    def _complete(self, event):
        self.expects_continue = False
        self.their_state = self._their_moves[SEND_BODY][self._their_end]
        if not self.keep_alive:
            self._no_keep_alive()
        return event

    def _chunks(self):
        """The next event of a chunked content: all that is there of it as one, because chunks may be very small."""
        if self._stage is _TRAILERS:
            return self._trailers()
        pieces = []
        try:
            while self._some_chunk(pieces):
                pass
        except ProtocolError:
            if not pieces:
                raise
            # C2. Nothing of what is wrong has been taken, so the next call finds it again.
        if pieces:
            self.expects_continue = False
            return Data(pieces[0] if len(pieces) == 1 else b"".join(pieces))
        if self._stage is _TRAILERS:
            return self._trailers()
        return self._more("a chunked content")

    def _some_chunk(self, pieces):
        """Go on as far as it is easy, or one step; whether there may be more."""
        if self._stage is _SIZE:
            self._whole_chunks(pieces)
            return self._chunk_size()
        size = min(self._left, len(self._buffer) - self._start)
        if self._stage is _INSIDE:
            if size:
                pieces.append(self._take(size))
            if self._left:
                return False
            self._stage = _AFTER
        end = self._buffer[self._start:self._start + 2]
        if not b"\r\n".startswith(end):
            raise ProtocolError(400, "a chunk of other than its size: no CRLF where it has to end")
        if len(end) < 2:
            return False
        self._start += 2
        self._scan, self._stage = self._start, _SIZE
        return True

    def _whole_chunks(self, pieces):
        """Chunks without extensions that are there as a whole: 0.5 µs each, by steps 1.6 µs."""
        buffer, start, body_size = self._buffer, self._start, self._body_size
        most = sys.maxsize if self.max_body is None else self.max_body
        while found := _CHUNK.match(buffer, start):
            size = int(found[1], 16)
            begin = found.end()
            end = begin + size
            if not size or body_size + size > most or buffer[end:end + 2] != b"\r\n":
                break
            pieces.append(bytes(buffer[begin:end]))
            body_size += size
            start = end + 2
        if start > self._start:
            self._start = self._scan = start
            self._body_size = body_size

    def _chunk_size(self):
        start = self._start
        line = self._take_line(self._max_chunk_line, 400, "the line that begins a chunk")
        if line is None:
            return False
        found = _CHUNK_LINE.fullmatch(line)
        size = int(found[1], 16) if found else 0
        if found is None or (self.max_body is not None and self._body_size + size > self.max_body):
            self._start = self._scan = start
            if found is None:
                raise ProtocolError(400, f"{_shown(line)} begins no chunk: 1 to 16 hexadecimal digits, perhaps extensions")
            raise ProtocolError(413, f"a content of more than {self.max_body} bytes")
        self._body_size += size
        self._left, self._stage = size, _INSIDE if size else _TRAILERS
        return size > 0

    def _trailers(self):
        if self._entries is None:
            self._entries = []
        while True:
            left = max(0, self._max_head - self._head_size)
            line = self._take_line(min(self._max_field, left), 431, "a line of the trailer section")
            if line is None:
                return self._more("a trailer section")
            self._head_size += len(line) + 2
            if not line:
                entries, self._entries, self._head_size = self._entries, None, 0
                return self._complete(EndOfMessage(Headers._of(entries)) if entries else _PLAIN_END)
            self._add_line(line)
            name = self._entries[-1][0]
            if name in _NOT_IN_TRAILERS:
                raise ProtocolError(400, f"{name} in a trailer section, where it would change what has been done by then")


# Reasons as RFC 9110 has them; the standard library's are older in some versions. They are for people: no program reads them.
REASONS = {status.value: status.phrase for status in http.HTTPStatus} | {
    413: "Content Too Large", 414: "URI Too Long", 416: "Range Not Satisfiable", 422: "Unprocessable Content"}
_STATUS_LINES = {status: f"HTTP/1.1 {status} {reason}\r\n".encode("ascii") for status, reason in REASONS.items()}

# Methods whose requests have a content, if an empty one: its length is then given (RFC 9110 8.6).
_WITH_CONTENT = frozenset(["POST", "PUT", "PATCH"])


def _status_line(head):
    """Of a response to be sent: b"HTTP/1.1 200 OK CRLF"."""
    reason = REASONS.get(head.status, "") if head.reason is None else head.reason
    if not _is_text(reason):
        raise LocalProtocolError(f"the reason {_shown(reason)} has a control character or one beyond U+00FF")
    return f"HTTP/1.1 {head.status} {reason}\r\n".encode("latin-1")


def _sent_values(entries, name):
    """All values of a name in entries to be sent, as one list."""
    return ", ".join(line[len(name) + 2:-2].decode("latin-1") for lower, line in entries if lower == name)


# The heads of answers that were made lately, up to the number after Content-Length: (status, headers) -> bytes. An answer's head
# differs from the one before by its Date, once a second: 0.5 µs instead of 1.7 for the two lines that all have.
_KNOWN_HEADS = {}
_known_head = _KNOWN_HEADS.get
_SENT_KNOWN = _TRANSITIONS[SERVER][SEND_RESPONSE][_WHOLE]


class _ReadyHead(ResponseHead):
    """One that is sent often: `data`, its bytes up to the number of a Content-Length, which it does not have itself."""

    __slots__ = ("data",)

    def __init__(self, status, headers):
        super().__init__(status, headers)
        self.data = b"".join([_STATUS_LINES[status], *[_sent(pair)[1] for pair in headers], b"Content-Length: "])


def _remember_head(head, index, lines):
    """Keep the head of an answer, unless its fields say more about the connection than its content, are long, or secret."""
    if "connection" in index or any(map(_is_secret, index)) or sum(map(len, lines)) > KNOWN_HEAD:
        return
    if len(_KNOWN_HEADS) >= KNOWN_HEADS:
        _KNOWN_HEADS.clear()
    _KNOWN_HEADS[head.status, head.headers] = b"".join([*lines, b"Content-Length: "])


class _Outgoing(_Incoming):
    """What we send: events to bytes."""

    __slots__ = ()

    def send(self, event):
        """The bytes of an event, to be sent in this order. LocalProtocolError: it may not be sent, and nothing has changed.

        The content of a response is framed by its Content-Length if there is one, and checked against it; else by chunks, or for
        HTTP/1.0 by the end of the connection. A request has a content if it has Content-Length or Transfer-Encoding: chunked.
        `Connection: close` or `keep-alive` is added where it has to be. Data in answer to HEAD is dropped.
        """
        sender = _SENDERS.get(type(event))
        if sender is None:
            raise TypeError(f"{event!r} is no event to send")
        return sender(self, event)

    def send_message(self, head, body=b""):
        """A RequestHead or ResponseHead, its content and its end as one bytes; Content-Length is added. Errors as send()'s."""
        size, kind = len(body) if type(body) is bytes else memoryview(body).nbytes, type(head)
        if kind is _ReadyHead and self._is_usual():
            self.our_state = _SENT_KNOWN
            return b"%b%d\r\n\r\n%b" % (head.data, size, body)
        if kind is ResponseHead or kind is _ReadyHead:
            if _WHOLE not in self._our_moves[self.our_state]:
                raise self._not_now(_WHOLE)
            if type(head.headers) is tuple and head.reason is None:
                known = _known_head((head.status, head.headers))
                if known is not None and self._is_usual():
                    self.our_state = _SENT_KNOWN
                    return b"%b%d\r\n\r\n%b" % (known, size, body)
            lines = self._response_lines(head, size)
            if self.our_state is SWITCHED:
                return b"".join(lines)
            self.our_state = self._our_moves[self.our_state][_WHOLE]
        elif type(head) is RequestHead:
            lines = [self._send_request(head, size)]
            self.our_state = self._our_moves[SEND_BODY][self._our_end]
        else:
            raise TypeError(f"{head!r} is no head of a message")
        if size:
            if self._out_mode is _BY_LENGTH:
                lines.append(body)
            elif self._out_mode is _BY_CHUNKS:
                lines += [b"%x\r\n" % size, body, b"\r\n"]
        if self._out_mode is _BY_CHUNKS:
            lines.append(b"0\r\n\r\n")
        if not self.keep_alive:
            self._no_keep_alive()
        return b"".join(lines)

    def note_message(self, method):
        """As send_message() of a request that has no content, no Connection and no Upgrade, and whose bytes are known."""
        if _REQUEST not in self._our_moves[self.our_state] or _REQUEST not in self._their_moves[self.their_state]:
            raise self._not_now(_REQUEST)
        self.method, self._out_mode, self._out_left = method, _BY_LENGTH, 0
        self.our_state = self._our_moves[SEND_BODY][_END]
        self.their_state = self._their_moves[self.their_state][_REQUEST]

    def _is_usual(self):
        """Whether a request of HTTP/1.1 is answered that goes on as most do: its head says all about the answer's framing."""
        return (self.our_state is SEND_RESPONSE and self.keep_alive and self._minor and self._their_end is _END
                and not self.expects_continue and self.method != "HEAD" and self.their_state in _LIVELY)

    def _not_now(self, what):
        return LocalProtocolError(f"{what} may not be sent by a {self.role} that is {self.our_state}")

    def _send_request(self, head, size=None):
        if self.role is not CLIENT or _REQUEST not in self._our_moves[self.our_state]:
            raise self._not_now(_REQUEST)
        if _REQUEST not in self._their_moves[self.their_state]:
            raise LocalProtocolError(f"a request may not be sent to a server that is {self.their_state}")
        method, target = head.method, head.target
        line = f"{method} {target} HTTP/1.1"
        if not _USUAL_LINE.fullmatch(line):
            if not _is_token(method):
                raise LocalProtocolError(f"{_shown(method)} is no method, because it is no token")
            if problem := _target_problem(method, target):
                raise LocalProtocolError(f"{_shown(target)} {problem}")
        entries, index = self._written(head.headers)
        if "host" not in index:
            raise LocalProtocolError(f"{_shown(line)}: a request has a Host")
        mode, left = self._announced(index, size)
        if method == "CONNECT" and (mode is _BY_CHUNKS or left is not None or size):
            raise LocalProtocolError("a CONNECT has no content, so neither Content-Length nor Transfer-Encoding")
        lines = [line.encode("ascii"), b"\r\n", *[entry[1] for entry in entries]]
        if left is None and mode is _BY_LENGTH and size is not None and (size or method in _WITH_CONTENT):
            lines.append(b"Content-Length: %d\r\n" % size)
        lines.append(b"\r\n")
        if "connection" in index:
            options = _option_set(_sent_values(entries, "connection"))
            self.keep_alive = "close" not in options
            if "upgrade" in options:
                self.upgrade = tuple(_split_list(_sent_values(entries, "upgrade")))
        if self.upgrade or method == "CONNECT":
            self._our_end = _ASK
        self.method, self._out_mode, self._out_left = method, mode, left or 0
        self.our_state = self._our_moves[self.our_state][_REQUEST]
        self.their_state = self._their_moves[self.their_state][_REQUEST]
        return b"".join(lines)

    def _send_response(self, head):
        if self.role is not SERVER or _RESPOND not in self._our_moves[self.our_state]:
            raise self._not_now(_RESPOND)
        lines = self._response_lines(head, None)
        if self.our_state is not SWITCHED:
            self.our_state = self._our_moves[self.our_state][_RESPOND]
        return b"".join(lines)

    def _send_informational(self, head):
        status = head.status
        if self.role is not SERVER or _INFORM not in self._our_moves[self.our_state]:
            raise self._not_now(_INFORM)
        if type(status) is not int or not 100 <= status <= 199 or not self._minor:
            raise LocalProtocolError(f"{status!r} for HTTP/1.{int(self._minor)}: an informational response is 100 to 199, and "
                                     "HTTP/1.0 has none")
        entries, index = self._written(head.headers)
        if "content-length" in index or "transfer-encoding" in index:
            raise LocalProtocolError(f"{status} has no content, so neither Content-Length nor Transfer-Encoding")
        if status == 101:
            chosen = _option_set(_sent_values(entries, "upgrade"))
            if not self.upgrade or self.their_state is not MIGHT_SWITCH:
                raise LocalProtocolError("101 is for a request that is complete and offers an Upgrade")
            if (not chosen or not chosen <= {protocol.lower() for protocol in self.upgrade}
                    or "upgrade" not in _option_set(_sent_values(entries, "connection"))):
                raise LocalProtocolError(f"101 has `Connection: Upgrade` and an Upgrade out of {self.upgrade}")
        lines = [_status_line(head), *[entry[1] for entry in entries], b"\r\n"]
        if status == 101:
            self._switch()
        if status == 100:                       # after a 103 the client waits for it still
            self.expects_continue = False
        return b"".join(lines)

    @staticmethod
    def _written(headers):
        """Pairs or Headers to be sent: [(lower-case name, line)], and a dict of it."""
        entries = list(map(_sent, headers))
        index = dict(entries)
        if len(index) != len(entries) and (problem := _repeated(entries)):
            raise LocalProtocolError(problem)
        return entries, index

    @staticmethod
    def _announced(index, size):
        """How fields that are to be sent frame a content of `size` bytes (None: not known yet): mode, and bytes or None."""
        if "transfer-encoding" in index:
            if "content-length" in index:
                raise LocalProtocolError("Transfer-Encoding and Content-Length at once: each says where the message ends")
            return _BY_CHUNKS, None
        if "content-length" not in index:
            return _BY_LENGTH, None
        left = int(index["content-length"][16:-2])
        if size is not None and left != size:
            raise LocalProtocolError(f"Content-Length: {left}, and the content has {size} bytes")
        return _BY_LENGTH, left

    def _response_lines(self, head, size):
        """The lines of a final response, whose content (of `size` bytes, if that is known) is framed by them from now on."""
        status, method, minor = head.status, self.method, self._minor
        if type(status) is not int or not 200 <= status <= 999:
            raise LocalProtocolError(f"{status!r} is no status of a final response: 200 to 999")
        entries, index = self._written(head.headers)
        if head.reason is None and status in _STATUS_LINES:
            lines = [_STATUS_LINES[status], *[entry[1] for entry in entries]]
        else:
            lines = [_status_line(head), *[entry[1] for entry in entries]]
        if method == "CONNECT" and status < 300:
            return self._accept(lines, index, size)
        empty = method == "HEAD" or status == 204 or status == 304
        mode, left = _BY_LENGTH, None
        if "content-length" in index or "transfer-encoding" in index:
            mode, left = self._announced(index, None if empty else size)
            if mode is _BY_CHUNKS and not minor:
                raise LocalProtocolError("Transfer-Encoding for HTTP/1.0, which has none; leave it out")
            if status == 204:
                if left != 0:
                    raise LocalProtocolError("204 has no content, so neither Content-Length nor Transfer-Encoding")
                lines.remove(index["content-length"])           # what nearly every framework adds, and RFC 9110 8.6 forbids
        if status == 205 and not empty:                         # it has none either, but its framing says so (RFC 9110 15.3.6)
            if size or left or mode is _BY_CHUNKS:
                raise LocalProtocolError(f"205 has no content, and {size or left or 'chunks'} were given")
            if left is None:
                lines.append(b"Content-Length: 0\r\n")
            left = 0
        keep_alive = self.keep_alive and self.their_state in _LIVELY and not self.expects_continue
        if empty:
            if size and method != "HEAD":
                raise LocalProtocolError(f"{status} has no content, and {size} bytes were given")
            if size is not None and left is None and mode is _BY_LENGTH and status != 204 and status != 304:
                lines.append(b"Content-Length: %d\r\n" % size)
            mode, left = _DROPPED, 0
        elif left is None and mode is _BY_LENGTH:
            if size is not None:
                if type(head.headers) is tuple and head.reason is None:
                    _remember_head(head, index, lines)
                lines.append(b"Content-Length: %d\r\n" % size)
                left = size
            elif minor:
                lines.append(b"Transfer-Encoding: chunked\r\n")
                mode = _BY_CHUNKS
            else:
                mode, keep_alive = _BY_CLOSE, False
        options = _option_set(_sent_values(entries, "connection")) if "connection" in index else _NO_OPTIONS
        if "close" in options:
            keep_alive = False
        elif not keep_alive:
            lines.append(b"Connection: close\r\n")
        elif not minor and "keep-alive" not in options:
            lines.append(b"Connection: keep-alive\r\n")
        lines.append(b"\r\n")
        self._out_mode, self._out_left = mode, left
        self._final(keep_alive)
        return lines

    def _final(self, keep_alive):
        """A final response is sent, or the end instead: what follows from it."""
        self.expects_continue = False
        if not keep_alive:
            self.keep_alive = False
            if self.their_state is IDLE:                    # it answers no request, and none is read any more
                self.their_state = self._their_moves[IDLE][_LAST]
                self._forget()
        if not keep_alive or self._their_end is _ASK:
            self._decline()

    def _accept(self, lines, index, size):
        """A CONNECT is accepted: from here on it is a tunnel."""
        if size or "content-length" in index or "transfer-encoding" in index:
            raise LocalProtocolError("an accepted CONNECT has no content, so neither Content-Length nor Transfer-Encoding")
        if self.their_state is not MIGHT_SWITCH:
            raise LocalProtocolError(f"the request is not complete: they are {self.their_state}")
        self._switch()
        return [*lines, b"\r\n"]

    # -- the content

    def _send_data(self, event):
        if _DATA not in self._our_moves[self.our_state]:
            raise self._not_now(_DATA)
        data, mode = event.data, self._out_mode
        size = len(data) if type(data) is bytes else memoryview(data).nbytes
        if mode is _DROPPED:
            if size and self.method != "HEAD":
                raise LocalProtocolError(f"this response has no content, and {size} bytes were given")
            data = b""
        elif mode is _BY_LENGTH:
            if size > self._out_left:
                raise LocalProtocolError(f"{size} bytes, and {self._out_left} are left of what Content-Length announced")
            self._out_left -= size
        elif mode is _BY_CHUNKS and size:               # (an empty chunk would be the last one)
            data = b"".join((b"%x\r\n" % size, data, b"\r\n"))
        self.our_state = self._our_moves[self.our_state][_DATA]
        return data if type(data) is bytes else bytes(data)

    def _send_end(self, event):
        if self._our_end not in self._our_moves[self.our_state]:
            raise self._not_now(_END)
        mode, trailers = self._out_mode, event.trailers
        if mode is _BY_LENGTH and self._out_left:
            raise LocalProtocolError(f"the end, and {self._out_left} bytes are left of what Content-Length announced")
        entries = self._written(trailers)[0] if trailers else ()
        if entries and mode is not _BY_CHUNKS and mode is not _DROPPED:
            raise LocalProtocolError("only a chunked content has a trailer section")
        if bad := [name for name, _ in entries if name in _NOT_IN_TRAILERS]:
            raise LocalProtocolError(f"{bad[0]} in a trailer section, where it would change what has been done by then")
        self.our_state = self._our_moves[self.our_state][self._our_end]
        if not self.keep_alive:
            self._no_keep_alive()
        return b"".join([b"0\r\n", *[entry[1] for entry in entries], b"\r\n"]) if mode is _BY_CHUNKS else b""

    def _send_close(self, event):
        if _CLOSE not in self._our_moves[self.our_state]:
            raise self._not_now(_CLOSE)
        self.our_state = self._our_moves[self.our_state][_CLOSE]
        self._final(keep_alive=False)
        return b""


_SENDERS = {RequestHead: _Outgoing._send_request, ResponseHead: _Outgoing._send_response, Data: _Outgoing._send_data,
            InformationalResponse: _Outgoing._send_informational, EndOfMessage: _Outgoing._send_end,
            ConnectionClosed: _Outgoing._send_close}


class HttpConnection(_Outgoing):
    """One end of an HTTP/1.1 connection, without its socket. `role`: "server" or "client".

    Limits of what is received; beyond them next_event() raises ProtocolError with the status in brackets: max_request_line
    bytes, of a status line too [414]; max_field_line bytes, max_fields lines, max_head bytes of a head or trailer section [431];
    max_chunk_line bytes [400]; max_body bytes of content, None for any number [413], and it may be set anew at any time.

    To be read, and set by what happens:

    our_state, their_state    the states above; both DONE: start_next_cycle(); MUST_CLOSE: close when both are through
    method                    of the current request; None while there is none
    keep_alive                whether there may be another cycle, as far as is known
    expects_continue          (server) the client waits for 100 before it sends the content; a final response instead ends the
                              connection, because whether the content still comes is open
    upgrade                   protocols that the client offers, a tuple: answer 101, or as if there were none
    trailing_data             what came after the request, or after the switch
    """

    __slots__ = ()

    def __init__(self, role, *, max_request_line=MAX_REQUEST_LINE, max_field_line=MAX_FIELD_LINE, max_fields=MAX_FIELDS,
                 max_head=MAX_HEAD, max_chunk_line=MAX_CHUNK_LINE, max_body=None):
        if role not in (CLIENT, SERVER):
            raise ValueError(f"{role!r} is no role: {CLIENT!r} or {SERVER!r}")
        self.role = CLIENT if role == CLIENT else SERVER        # compared by identity
        self._max_first, self._max_field, self._max_fields = max_request_line, max_field_line, max_fields
        self._max_head, self._max_chunk_line, self.max_body = max_head, max_chunk_line, max_body
        self._least_line = min(max_request_line, max_field_line)
        self._our_moves = _TRANSITIONS[role]
        self._their_moves = _TRANSITIONS[SERVER if role == CLIENT else CLIENT]
        self._awaits = IDLE if role == SERVER else SEND_RESPONSE        # the state in which they send a head
        self.forget_fields()
        self._ended, self._error = False, None
        self._buffer, self._start, self._scan = b"", 0, 0
        self._first = self._entries = None      # of a head that comes in pieces: its first line, its field lines
        self._head_size = 0                     # bytes of it so far
        self._mode, self._left, self._stage, self._body_size = _BY_LENGTH, 0, _SIZE, 0
        self._out_mode, self._out_left = _BY_LENGTH, 0
        self.our_state = self.their_state = IDLE
        self._begin()

    def _begin(self):
        """Nothing is known of the current message."""
        self.keep_alive, self.expects_continue, self.upgrade, self.method, self._minor = True, False, (), None, 1
        self._our_end = self._their_end = _END
        self._blank = False

    @property
    def reusable(self):
        """Whether start_next_cycle() may be called: both sides are DONE."""
        return self.our_state is DONE and self.their_state is DONE

    def start_next_cycle(self):
        """Begin anew, with what has been received since. LocalProtocolError if the connection is not `reusable`."""
        if self.our_state is not DONE or self.their_state is not DONE:
            raise LocalProtocolError(f"no next cycle: we are {self.our_state}, they are {self.their_state}, and both have to be "
                                     "DONE; close the connection")
        self.our_state = self._our_moves[DONE][_NEXT]
        self.their_state = self._their_moves[DONE][_NEXT]
        self._begin()
        if self._start and self._start == len(self._buffer):
            self._buffer, self._start, self._scan = b"", 0, 0       # so that an idle connection holds no memory


# ---- typed handlers --------------------------------------------------------------------------------------------
#
# An annotation is read once, when the handler is registered; flowcoro_schema says what it takes, and how strictly.

class UnprocessableContent(HttpError):
    """422: what came is well-formed, but not what the handler's annotations ask for (RFC 9110 section 15.5.21).

    `errors`: what is wrong, as dicts of strings: "in" ("body" or "query"), "path" (a JSON Pointer, RFC
    6901, such as "/items/0/price"; "" is the whole; or the name of a query parameter), "expected", "got". `document` is what to
    answer as JSON.
    """

    def __init__(self, errors):
        super().__init__(422, "; ".join(f"{error['in']} {error['path']}: expected {error['expected']}, got {error['got']}"
                                        for error in errors[:3]))
        self.errors = errors

    @property
    def document(self):
        """The body of the answer, to be made JSON."""
        return {"status": 422, "title": "Unprocessable Content", "errors": self.errors}


def _shown_handler(handler):
    return f"{getattr(handler, '__module__', '?')}.{getattr(handler, '__qualname__', type(handler).__qualname__)}"


# -- how a handler is called

class _Plan:
    """What a handler's signature says, once: `call` is awaited with the request and the path's parameters that are `wanted`.

    `wanted`: None: all of them; else a tuple of names. `body`: a flowcoro_schema.Field or None; `query`: a list of such.
    """

    def __init__(self, handler, names, converters, methods, said, limits):
        self.handler, self.said, self.limits = handler, f"{said}, {_shown_handler(handler)}", limits
        self.body, self.query = None, []
        function = self._function()
        first, *others = self._parameters()
        if first.name in names:
            raise ValueError(f"{self.said}: the first parameter is the request, and the path has a parameter of that name, "
                             f"{first.name!r}")
        named = []
        takes_all = any(other.kind is other.VAR_KEYWORD for other in others)
        for other in others:
            if other.name in names and other.kind not in (other.VAR_KEYWORD, other.VAR_POSITIONAL):
                self._check_path_parameter(other, converters.get(other.name), function)
                named.append(other.name)
            elif other.kind not in (other.VAR_KEYWORD, other.VAR_POSITIONAL):
                self._add(other, function, methods, names)
        self.wanted = None if takes_all or len(named) == len(names) > 0 else tuple(named)
        if names[-1:] == ("rest",) and not methods and self.wanted is not None and "rest" not in named:
            raise TypeError(f"{self.said}: a mounted handler takes the rest of the path: async def handler(request, rest)")
        self.call = handler if not (self.body or self.query) else self._typed(handler)
        if inspect.isasyncgenfunction(function):
            self.call = _generator_call(handler) if not (self.body or self.query) else self._typed(_generator_call(handler))

    def _function(self):
        """The function whose globals the annotations are looked up in; TypeError when calling the handler gives no awaitable."""
        function = self.handler
        while isinstance(function, functools.partial):
            function = function.func
        if not inspect.isroutine(function) and not isinstance(function, type) and hasattr(function, "__call__"):
            function = type(function).__call__
        if not (inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)):
            raise TypeError(f"{self.said}: a handler is async: write `async def`")
        return function

    def _parameters(self):
        parameters = list(inspect.signature(self.handler).parameters.values())
        if not parameters or parameters[0].kind in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD):
            raise TypeError(f"{self.said}: the first parameter of a handler is the request: async def handler(request)")
        return parameters

    def _annotation(self, annotation, function):
        """An annotation without names in quotes. TypeError when it has one that is not there."""
        if annotation is inspect.Parameter.empty:
            return annotation
        try:
            holder = types.SimpleNamespace(__annotations__={"it": annotation})
            scope = getattr(inspect.unwrap(function), "__globals__", {})
            return typing.get_type_hints(holder, scope, include_extras=True)["it"]
        except (NameError, SyntaxError) as error:
            raise TypeError(f"{self.said}: {error}; annotations are looked up in the module of the handler") from None

    def _check_path_parameter(self, parameter, converter, function):
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise TypeError(f"{self.said}: {parameter.name} is passed by its name, so it cannot stand before \"/\"")
        try:
            wanted = flowcoro_schema.bare(self._annotation(parameter.annotation, function))
        except TypeError:
            return                              # nothing depends on it
        given = converter and converter.type
        if wanted in (str, int, float, uuid.UUID) and given and wanted is not given and (wanted, given) != (float, int):
            raise TypeError(f"{self.said}: {parameter.name} is annotated with {wanted.__name__}, but {{{parameter.name}:"
                            f"{converter.name}}} gives {given.__name__}; write {{{parameter.name}:{wanted.__name__.lower()}}}")

    def _add(self, parameter, function, methods, names):
        """Take a parameter that the path does not have from the body or the query."""
        said = f"{self.said}: {parameter.name}"
        annotation = self._annotation(parameter.annotation, function)
        default = flowcoro_schema.MISSING if parameter.default is parameter.empty else parameter.default
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise TypeError(f"{said} is passed by its name, so it cannot stand before \"/\"")
        if annotation is not parameter.empty and _has_dataclass(annotation):
            if self.body is not None:
                raise TypeError(f"{said}: there is one body, and {self.body.name} takes it already")
            if not {"GET", "HEAD", "TRACE"}.isdisjoint(methods):
                raise TypeError(f"{said} is taken from the body, and {' and '.join(methods)} may not have one")
            self.body = flowcoro_schema.Field(parameter.name, flowcoro_schema.kind_of(annotation, said),
                                              flowcoro_schema.description_of(annotation), default)
        elif parameter.kind is parameter.KEYWORD_ONLY:
            kind = flowcoro_schema.kind_of(str if annotation is parameter.empty else annotation, said)
            if not _is_of_query(kind):
                raise TypeError(f"{said}: the query has texts, numbers, true and false, and list[...] of these")
            self.query.append(flowcoro_schema.Field(parameter.name, kind, flowcoro_schema.description_of(annotation), default))
        else:
            raise TypeError(
                f"{said} comes from nowhere: the path has {', '.join(names) or 'no parameters'}; a dataclass would be taken from "
                f"the body, and a keyword-only parameter (after *) from the query; one of an include(prefix=) is not known yet")

    def _typed(self, handler):
        body, query = self.body, [(field, *_reader(field.kind)) for field in self.query]
        max_depth, max_errors = self.limits

        async def call(request, **arguments):
            errors = flowcoro_schema.Errors(max_errors)
            for field, read, many in query:
                texts = request.query.get_all(field.name)
                if texts:
                    arguments[field.name] = _read_query(field, read, many, texts, errors)
                elif field.default is flowcoro_schema.MISSING:
                    errors.add_named(field.name, "query", field.kind.expected, flowcoro_schema.MISSING)
            if body is not None:
                data = await request.body()
                if data or body.default is flowcoro_schema.MISSING:
                    arguments[body.name] = body.kind.check(_json_of(request, data, max_depth), None, errors)
            if errors.count:
                raise UnprocessableContent(errors.first)
            return await handler(request, **arguments)
        return call

    def returns(self):
        """The annotation of what the handler returns; inspect.Parameter.empty when there is none, or none that can be found."""
        try:
            return self._annotation(inspect.signature(self.handler).return_annotation, self._function())
        except TypeError:
            return inspect.Parameter.empty


def _generator_call(handler):
    """An async generator function as a coroutine function that returns the generator."""
    async def call(request, **arguments):
        return handler(request, **arguments)
    return call


def _has_dataclass(annotation):
    annotation = flowcoro_schema.bare(annotation)
    return dataclasses.is_dataclass(annotation) or any(map(_has_dataclass, typing.get_args(annotation)))


def _is_of_query(kind):
    scalar, array, union = flowcoro_schema.Scalar, flowcoro_schema.Array, flowcoro_schema.Union
    if isinstance(kind, array):
        return isinstance(kind.item, scalar) or isinstance(kind.item, union) and kind.item.members == kind.item.scalars
    if isinstance(kind, union):
        return all(isinstance(one, scalar) or isinstance(one, array) and len(kind.scalars) == kind.null and _is_of_query(one)
                   for one in kind.members)
    return isinstance(kind, scalar)


def _reader(kind):
    """What reads one text of the query, and whether there may be many."""
    if isinstance(kind, flowcoro_schema.Union) and kind.lists:
        kind = kind.lists[0]
    return (kind.item, True) if isinstance(kind, flowcoro_schema.Array) else (kind, False)


def _read_query(field, kind, many, texts, errors):
    if not many and len(texts) > 1:
        return errors.add_named(field.name, "query", f"{kind.expected}, once", texts)
    values = []
    for text in texts:
        try:
            values.append(kind.read(text))
        except (ValueError, ArithmeticError):
            errors.add_named(field.name, "query", kind.expected, text)
    return values if many else values[0] if values else None


@_known
def _is_json(value):
    """Whether a Content-Type value says JSON in UTF-8."""
    try:
        media = parse_media_type(value)
        return (media.type == "application" and (media.subtype == "json" or media.subtype.endswith("+json"))
                and media.charset() == "utf-8")
    except ProtocolError:
        return False


def _json_of(request, data, max_depth):
    """The body as JSON. HttpError(415) unless it says that it is: a form of a foreign page, which may say text/plain, is none."""
    if not _is_json(request.headers.get("content-type", "")):
        raise HttpError(415, "the body has to be JSON in UTF-8: Content-Type: application/json", [("Accept", "application/json")])
    try:
        return flowcoro_schema.load_json(data, max_depth=max_depth)
    except flowcoro_schema.JsonError as error:
        raise HttpError(400, f"the body is no JSON that is taken here: {error}") from None


# ---- router ---------------------------------------------------------------------------------------------------
#
# A pattern is a list of parts, one for each segment of a path, and all patterns make a tree: a node has children by text
# (a dict) and children by converter. A path is looked up first in a dict of whole paths, where all patterns without a
# parameter are: that is two lookups. Else it is divided at "/", each segment is decoded, and the tree is searched, the most
# specific child first: text, then converters in the order of their rank, then {name:path}.
#
#     R1  a node is reached by one way only, since each part takes exactly one segment (and {name:path}, which takes many, is
#         last): a search visits no node twice, so it costs at most the tree, and linear in the path whatever the path is
#     R2  the order in which patterns were added plays no part: two of the same rank at one node have the same converter
#     R3  what the dict of whole paths has is what the tree would have found first
#
# Rejected: regular expressions, one for each route or one for all (order decides, and some can be made to explode); parameters
# that are a part of a segment, "{name}.json" (one segment could match in many ways); resolving "." and "..", which is for
# those who serve files to do, or refuse, after the path has been decoded.

# The rank of converters of one's own: after uuid (0), int (1) and float (2), before str (4) and path (5).
OWN_RANK = 3

# Paths with parameters that are remembered with what was found, and characters of one: 0.4 µs instead of 2.5 for what is asked
# for often; what is asked for once costs 0.2 more.
FOUND_PATHS, FOUND_PATH = 1024, 128

# Characters that a segment of a path may have as they are (RFC 3986 section 3.3, pchar), besides those that
# urllib.parse.quote() never encodes.
_PCHAR = "!$&'()*+,;=:@"

_bad_escape_of_text = re.compile(_BAD_ESCAPE).search
_is_parameter = re.compile(r"\{([^{}:]*)(?::([^{}:]*))?\}").fullmatch
_is_label = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?").fullmatch
_is_int = re.compile(rf"-?[0-9]{{1,{flowcoro_schema.DIGITS}}}").fullmatch
_is_float = re.compile(rf"-?[0-9]{{1,{flowcoro_schema.DIGITS}}}(?:\.[0-9]{{1,{flowcoro_schema.DIGITS}}})?").fullmatch
_is_uuid = re.compile(r"[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}").fullmatch

# The parameters of all matches that have none: shared, so nobody may write into it. And the methods of a path that is not there.
_NOTHING, _NO_METHODS = types.MappingProxyType({}), {}


class _Converter:
    """How a parameter is read from one segment of a path, and written into it: see Router.add_converter().

    Of one place in a path the converter of the lowest rank is asked first; of equal ones the one whose name is first.
    """

    __slots__ = ("name", "parse", "format", "schema", "type", "rank", "read")

    def __init__(self, name, parse, format=str, *, schema=None, type=None, rank=None):
        self.name, self.parse, self.format, self.type = name, parse, format, type
        self.schema = {"type": "string"} if schema is None else schema
        # What a search calls. Those of this module, which have a rank, raise nothing.
        self.rank, self.read = (OWN_RANK, self.value) if rank is None else (rank, parse)

    def __repr__(self):
        return f"<_Converter {self.name}>"

    def text(self, value):
        """The text of a value, which parse() takes back; ValueError when there is none."""
        text = self.format(value)
        if not isinstance(text, str) or text in (".", "..") or not text and self is not _PATH or self.value(text) is None:
            raise ValueError(f"{value!r:.80} is no {self.name} that a path can have")
        return text

    def value(self, text):
        """The value of a text, or None."""
        if self.parse is None:                  # any text
            return text
        try:
            return self.parse(text)
        except ValueError:
            return None


def _parse_int(text):
    if text.isdecimal() and text.isascii() and len(text) <= flowcoro_schema.DIGITS:        # half the time of the pattern
        return int(text)
    return int(text) if _is_int(text) else None


def _parse_rest(text):
    """A path that stays below what it is appended to, as far as that can be seen here: it does not begin with "/"."""
    return None if text[:1] == "/" or any(segment in (".", "..") for segment in text.split("/")) else text


def _format_float(value):
    text = str(value)
    return format(decimal.Decimal(text), "f") if "e" in text else text         # 1e+16, 1e-07


_STR, _PATH = _Converter("str", None, type=str, rank=4), _Converter("path", _parse_rest, type=str, rank=5)

_CONVERTERS = {converter.name: converter for converter in (
    _Converter("uuid", lambda text: uuid.UUID(text) if _is_uuid(text) else None,
               schema={"type": "string", "format": "uuid"}, type=uuid.UUID, rank=0),
    _Converter("int", _parse_int, schema={"type": "integer"}, type=int, rank=1),
    _Converter("float", lambda text: float(text) if _is_float(text) else None, _format_float,
               schema={"type": "number"}, type=float, rank=2),
    _STR, _PATH)}


class Match:
    """A route that takes a request: what Router.find() returns when `status` is 200.

    `handler(request, **arguments)` is awaited; `arguments` is empty when the handler wants the request alone. `params` are all
    parameters of the path, {name: value}, for request.params; `route` is the Route.
    """

    __slots__ = ("handler", "arguments", "params", "route")

    status, allow, location = 200, "", ""

    def __init__(self, route, params):
        self.route, self.params, self.handler = route, params, route.call
        wanted = route.wanted
        if wanted is None:
            self.arguments = params
        elif wanted:
            self.arguments = {name: params[name] for name in wanted}
        else:
            self.arguments = _NOTHING

    def __repr__(self):
        return f"<Match {self.route.path} {dict(self.params)}>"


class _Answer(Match):
    """What to answer when there is no handler to ask: `handler` is None, `status` 204, 308, 400, 404 or 405."""

    __slots__ = ("status", "allow", "location")

    def __init__(self, status, allow="", location=""):
        self.status, self.allow, self.location = status, allow, location
        self.handler = self.route = None
        self.arguments = self.params = _NOTHING

    def __repr__(self):
        return f"<Match {self.status} {self.allow}{self.location}>"


_BAD_PATH, _NOT_FOUND = _Answer(400), _Answer(404)


def _parse_pattern(path, converters, said):
    """The parts of a pattern: str for a text, (name, _Converter) for a parameter."""
    if not isinstance(path, str):
        raise TypeError(f"{said}: give the path as a str, such as \"/users/{{id:int}}\"")
    if path == "":
        return []
    if path[0] != "/":
        raise ValueError(f"{said}: a path begins with \"/\"")
    found = re.search("[\0-\x1f\x7f?#]|%[0-9A-Fa-f]{2}", path)
    if found:
        raise ValueError(f"{said}: a path has no {found[0]!r}; it is written as text, not encoded (a space, not %20), and "
                         "without a query")
    parts = [_parse_part(segment, converters, said) for segment in path[1:].split("/")]
    if "" in parts[:-1]:
        raise ValueError(f"{said}: there is an empty segment (\"//\") in the path")
    if any(part in (".", "..") for part in parts):
        raise ValueError(f"{said}: clients resolve \".\" and \"..\" before they send a path, so it would never match")
    for part in parts[:-1]:
        if isinstance(part, tuple) and part[1] is _PATH:
            raise ValueError(f"{said}: {{{part[0]}:path}} takes all of the rest, so it has to be last")
    return parts


def _parse_part(segment, converters, said):
    if "{" not in segment and "}" not in segment:
        return segment
    found = _is_parameter(segment)
    if not found:
        raise ValueError(f"{said}: {segment!r} is no parameter; one fills its whole segment: {{name}} or {{name:converter}}, "
                         "and a path has no other braces")
    name, kind = found[1], found[2]
    if not (name.isidentifier() and name.isascii()) or keyword.iskeyword(name):
        raise ValueError(f"{said}: {{{name}}}: the name of a parameter is passed to the handler, so it must be an identifier")
    if kind is not None and kind not in converters:
        raise ValueError(f"{said}: there is no converter {kind!r}; there are {', '.join(sorted(converters))}, and "
                         "add_converter() adds one")
    return name, converters[kind or "str"]


def _parse_host(host, converters, said):
    """The labels of a host, as parts; None for any host."""
    if host is None:
        return None
    if not isinstance(host, str):
        raise TypeError(f"{said}: host={host!r}: give a str, such as \"api.example.com\" or \"{{tenant}}.example.com\"")
    parts = [_parse_part(label, converters, f"{said}, host={host!r}") for label in host.split(".")]
    for part in parts:
        if isinstance(part, tuple) and part[1] is _PATH or isinstance(part, str) and not _is_label(part):
            raise ValueError(f"{said}: host={host!r}: a host is labels with dots between, in lower case and without a port; a "
                             "label is text or a parameter")
    return parts


def _names_of(parts):
    return [part[0] for part in parts if isinstance(part, tuple)]


def _quoted(segment):
    return urllib.parse.quote(segment, safe=_PCHAR)


def _written(parts):
    """The pattern of parts."""
    return "".join("/" + (part if isinstance(part, str) else f"{{{part[0]}}}" if part[1] is _STR else
                          f"{{{part[0]}:{part[1].name}}}") for part in parts)


class Route:
    """One pattern with its handler, as Router.routes() lists it. Not to be changed.

    `path` and `host` (or None) are the patterns with all prefixes, `methods` a tuple of those that were given (empty: a mount,
    which takes all), `name` or None, `handler` the function that was given, `documented` whether openapi() shows it.
    """

    __slots__ = ("path", "methods", "host", "name", "handler", "documented", "is_mount", "encoded_slashes",
                 "parts", "host_parts", "limits", "names", "call", "wanted", "plan")

    def __init__(self, parts, handler, methods, *, name, host_parts, limits, documented=True, is_mount=False,
                 encoded_slashes=False):
        self.parts, self.handler, self.methods, self.name, self.host_parts = parts, handler, methods, name, host_parts
        self.limits = limits            # of a typed handler: depth of JSON, errors that are listed
        self.documented, self.is_mount, self.encoded_slashes = documented, is_mount, encoded_slashes
        self.path = _written(parts)
        self.host = None if host_parts is None else _written(host_parts)[1:].replace("/", ".")
        said = str(self)
        self.names = (*_names_of(host_parts or ()), *_names_of(parts), *(("rest",) if is_mount else ()))
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"{said}: two parameters have the same name")
        converters = {part[0]: part[1] for part in [*(host_parts or ()), *parts] if isinstance(part, tuple)}
        self.plan = _Plan(handler, self.names, converters, methods, said, limits)
        self.call, self.wanted = self.plan.call, self.plan.wanted

    def __repr__(self):
        return f"<Route {self}>"

    def __str__(self):
        return f"{', '.join(self.methods) or 'mount'} {self.host or ''}{self.path or '/'}"

    def _below(self, parts, host_parts, name):
        """The same one in a router that includes its router."""
        if host_parts is not None and self.host_parts is not None:
            raise ValueError(f"{self}: it has a host already, so its router cannot be included with host=")
        full_name = self.name and (f"{name}.{self.name}" if name else self.name)
        return Route([*parts, *self.parts], self.handler, self.methods, name=full_name, documented=self.documented,
                     limits=self.limits, host_parts=self.host_parts if host_parts is None else host_parts,
                     is_mount=self.is_mount, encoded_slashes=self.encoded_slashes)

    def _url(self, params):
        """The path (with "//host" before it) and what of `params` is no parameter of it."""
        params = dict(params)
        path = "".join("/" + self._part_text(part, params) for part in self.parts)
        if self.is_mount:
            rest = params.pop("rest", "")
            if not isinstance(rest, str) or rest and (rest[0] != "/" or _parse_rest(rest[1:]) is None):
                raise ValueError(f"{self}: rest={rest!r:.80}: give \"\", or a path that begins with one \"/\" and "
                                 "has no dot segments")
            path += urllib.parse.quote(rest, safe="/" + _PCHAR)
        host = ""
        if self.host_parts is not None:
            labels = [self._part_text(part, params).lower() for part in self.host_parts]
            if not all(map(_is_label, labels)):
                raise ValueError(f"{self}: {'.'.join(labels)!r:.80} is no host")
            host = "//" + ".".join(labels)
        return host + (path or "/"), params

    def _part_text(self, part, params):
        if isinstance(part, str):
            return _quoted(part)
        name, converter = part
        if params.get(name) is None:
            raise ValueError(f"url_for({self.name!r}) needs {name}=; {self} has the parameters {', '.join(self.names)}")
        try:
            text = converter.text(params.pop(name))
        except (ValueError, TypeError) as error:
            raise ValueError(f"url_for({self.name!r}): {name}=: {error}") from None
        return urllib.parse.quote(text, safe="/" + _PCHAR if converter is _PATH else _PCHAR)


class _Node:
    """A place in the tree of patterns."""

    __slots__ = ("texts", "others", "rest", "routes", "mount")

    def __init__(self):
        self.texts = {}         # segment -> _Node
        self.others = []        # (_Converter, its read, _Node), the most specific last: it is to come off a stack first
        self.rest = None        # the _Node of {name:path}, which has only routes
        self.routes = {}        # method -> Route; HEAD is GET's until it gets one of its own
        self.mount = None       # Route


class _Tree:
    """The patterns for one host, or for any."""

    __slots__ = ("root", "whole")

    def __init__(self):
        self.root = _Node()
        self.whole = {}         # path as clients send it -> {method: Match}, of patterns without parameters

    def node(self, parts):
        """The node of a pattern, made if there is none: one without routes changes nothing."""
        node = self.root
        for part in parts:
            if isinstance(part, str):
                if part not in node.texts:
                    node.texts[part] = _Node()
                node = node.texts[part]
            elif part[1] is _PATH:
                node.rest = node = node.rest or _Node()
            else:
                node = self._child(node, part[1])
        return node

    @staticmethod
    def _child(node, converter):
        for other, _, child in node.others:
            if other is converter:
                return child
            if (other.rank, other.name) == (converter.rank, converter.name):
                raise ValueError(f"two different converters are called {other.name!r} at one place of the path; rename one")
        child = _Node()
        node.others = sorted([*node.others, (converter, converter.read, child)], reverse=True,
                             key=lambda other: (other[0].rank, other[0].name))
        return child

    def add(self, route):
        node = self.node(route.parts)
        if route.is_mount:
            node.mount = route
            return
        for method in route.methods:
            node.routes[method] = route
        if "GET" in route.methods:
            node.routes.setdefault("HEAD", route)
        if not _names_of(route.parts):
            path = "".join("/" + _quoted(part) for part in route.parts)
            self.whole[path] = {method: Match(at, _NOTHING) for method, at in node.routes.items() if not at.names}

    def search(self, segments, slash, method, values=()):
        """A Match, or the tuple (methods of routes that match but for theirs, the deepest mount: (Route, values, depth)).

        segments: decoded, the first is what stands before the first "/"; slash: the last of them that has a "/" of its own, or 0
        """
        node, at, end = self.root, 1, len(segments)
        waiting, methods, mount = [], None, None
        while True:
            if node.mount is not None and (mount is None or at > mount[2]) and (at > slash or node.mount.encoded_slashes):
                mount = node.mount, values, at
            if at == end:
                route = node.routes.get(method)
                if route is not None:
                    return Match(route, dict(zip(route.names, values)))
                if node.routes:
                    methods = {*(methods or ()), *node.routes}
            else:
                segment = segments[at]
                if node.rest is not None and at > slash and (segment or at + 1 == end):
                    waiting.append((node.rest, -at, values))
                at += 1
                if segment:
                    for _, read, child in node.others:
                        value = segment if read is None else read(segment)
                        if value is not None:
                            waiting.append((child, at, (*values, value)))
                node = node.texts.get(segment)
                if node is not None:
                    continue
            if not waiting:
                return methods, mount
            node, at, values = waiting.pop()
            if at < 0:
                at, values = end, values + ("/".join(segments[-at:]),)


class Router:
    """Who answers which method and path: registers handlers, finds them, and builds URLs.

    A pattern is text with parameters, each of one whole segment: {name} (any text), {id:int}, {x:float} (digits, a "-" before
    them), {id:uuid}, or a converter of your own; the last may be {rest:path}, which takes all of the rest, but never begins with
    "/". The most specific pattern wins: text before uuid, int, float, own converters and str, these before path, from the left;
    a method that it does not have is looked for in the next. The order of registration plays no part.

    A handler is an `async def`. Its first parameter is the request; parameters of the path that it names it gets as keyword
    arguments, all of them with `**params`. One that names none is called with the request alone. More can be filled from the
    body and the query (typed handlers). All this is decided when it is registered.

    prefix: stands before all paths. redirect_slashes: whether a path that does not match, but would with its last "/" taken away
    or added, is answered with a redirect (308). json_depth: arrays and objects in each other in a typed handler's body;
    max_errors: those that a 422 lists.

    What cannot be (a pattern that is none, a method that is taken, a handler that is not async ...) raises ValueError or
    TypeError where it is registered; nothing of it is added then.
    """

    def __init__(self, prefix="", redirect_slashes=False, *, json_depth=flowcoro_schema.JSON_DEPTH,
                 max_errors=flowcoro_schema.ERRORS):
        self.redirect_slashes = redirect_slashes
        self._limits = json_depth, max_errors
        self._converters = dict(_CONVERTERS)
        self._parts = self._prefix(prefix, "Router()")
        self._routes = []
        self._named = {}
        self._tree = _Tree()            # for any host
        self._hosts = {}                # what each label of a host is, a str or a _Converter -> _Tree; the most specific first
        self._whole = self._tree.whole  # what find() looks into first: nothing as soon as there are hosts
        self._found = {}                # (method, path) -> Match of paths with parameters, lately: without hosts only
        self._remembers = True          # not with converters of one's own: they may say something else the next time
        self._parents = []              # (Router, parts, host parts, name) of those that include this one

    def _prefix(self, prefix, said):
        parts = _parse_pattern(prefix, self._converters, f"{said}, prefix={prefix!r}")
        if parts and (parts[-1] == "" or not isinstance(parts[-1], str) and parts[-1][1] is _PATH):
            raise ValueError(f"{said}, prefix={prefix!r}: it cannot end with \"/\" or {{...:path}}, since paths are appended "
                             "to it")
        return parts

    # -- registering

    def add_converter(self, name, parse, format=str, *, schema=None, type=None):
        """Make {x:name} usable in patterns that are registered in this router from now on.

        parse(text) gets a segment that is not empty, decoded, and returns the value; None or a ValueError say that the text is
        none. It runs for each request that may match, so it has to be linear in the text. format(value) returns the text for
        url_for(). `schema` is the JSON Schema that openapi() shows; `type` is what the handler's annotation must be, if there is
        one.
        """
        if not isinstance(name, str) or not re.fullmatch("[a-z][a-z0-9_]*", name):
            raise ValueError(f"add_converter({name!r}): the name is lower-case letters, digits and \"_\"")
        if name in self._converters:
            raise ValueError(f"add_converter({name!r}): there is one of that name already")
        self._converters[name] = _Converter(name, parse, format, schema=schema, type=type)

    def add(self, path, handler, methods=("GET",), *, name=None, host=None, documented=True):
        """Have `handler` answer these methods of a path, and HEAD with GET unless another one does. Returns the Route."""
        said = f"{path!r} of {getattr(handler, '__qualname__', handler)!s:.80}"
        if isinstance(methods, str):
            raise TypeError(f"{said}: methods={methods!r}: give a list: [{methods!r}]")
        methods = tuple(dict.fromkeys(methods))
        if not methods:
            raise ValueError(f"{said}: methods= is empty")
        for method in methods:
            if not isinstance(method, str) or not _is_token(method) or method != method.upper() or method == "CONNECT":
                raise ValueError(f"{said}: {method!r} is no method; they are case-sensitive (GET), and CONNECT has no path")
        parts = [*self._parts, *_parse_pattern(path, self._converters, said)]
        if not parts:
            raise ValueError(f"{said}: an empty path needs a prefix: Router(prefix=); the root is \"/\"")
        route = Route(parts, handler, methods, name=name, documented=documented, limits=self._limits,
                      host_parts=_parse_host(host, self._converters, said))
        self._insert([route])
        return route

    def route(self, path, methods=("GET",), *, name=None, host=None, documented=True):
        """The same as a decorator; the function stays as it is."""
        def decorate(handler):
            self.add(path, handler, methods, name=name, host=host, documented=documented)
            return handler
        return decorate

    def get(self, path, **options):
        """@router.get(path): route() for GET (and HEAD)."""
        return self.route(path, ("GET",), **options)

    def post(self, path, **options):
        """@router.post(path): route() for POST."""
        return self.route(path, ("POST",), **options)

    def put(self, path, **options):
        """@router.put(path): route() for PUT."""
        return self.route(path, ("PUT",), **options)

    def patch(self, path, **options):
        """@router.patch(path): route() for PATCH."""
        return self.route(path, ("PATCH",), **options)

    def delete(self, path, **options):
        """@router.delete(path): route() for DELETE."""
        return self.route(path, ("DELETE",), **options)

    def websocket(self, path, *, name=None, host=None, **options):
        """A decorator: `async def handler(ws, …)` gets the WebSocket of whoever asks for one at `path`, whose parameters it names
        as other handlers do. It is closed when the handler returns, with 1011 if that fails, and with 1001 when the server ends.

        `options` are those of flowcoro_websocket.accept(): origins, subprotocols, max_message … The handshake goes through the
        middleware; `ws.request` is its request. A handler that lets the ConnectionClosed of its client go on is not reported.
        It is for an HttpServer(websocket=flowcoro_websocket.accept), which this is or is included in.
        """
        def decorate(handler):
            self.add(path, _websocket_handler(handler, options), name=name, host=host, documented=False)
            return handler
        return decorate

    def include(self, router, *, prefix="", host=None, name=None):
        """Have this router answer what another one does, now and later, below `prefix`, and for `host` only.

        Its names become "name.its". Who wants a parameter of the prefix as an argument gives it to Router(prefix=) instead, so
        that it is known when the handler is registered; in request.params it is with both.
        """
        if not isinstance(router, Router):
            raise TypeError(f"include({router!r:.80}): give a Router; a handler is mounted")
        if router is self or router in self._ancestors():
            raise ValueError("include(): that router includes this one")
        parts = [*self._parts, *self._prefix(prefix, "include()")]
        parent = self, parts, _parse_host(host, self._converters, "include()"), name
        self._insert([route._below(*parent[1:]) for route in router._routes])
        router._parents.append(parent)

    def mount(self, prefix, handler, *, name=None, host=None, encoded_slashes=False):
        """Give `handler` all requests below a prefix that no route matches, whatever their method; a Router is included.

        It is called with (request, rest=...): the rest of the path, decoded: "" or what begins with "/". Of two mounts the
        longer one wins. A path with an encoded "/" (%2F) in its rest is not found, since in `rest` it would look like any other,
        unless encoded_slashes is True. "." and ".." are left as they are. Returns the Route, or None for a Router.
        """
        if isinstance(handler, Router):
            self.include(handler, prefix="" if prefix == "/" else prefix, host=host, name=name)
            return None
        said = f"mount({prefix!r})"
        parts = [*self._parts, *self._prefix("" if prefix == "/" else prefix, said)]
        route = Route(parts, handler, (), name=name, documented=False, is_mount=True, encoded_slashes=encoded_slashes,
                      host_parts=_parse_host(host, self._converters, said), limits=self._limits)
        self._insert([route])
        return route

    def _ancestors(self):
        found, remaining = [], [self]
        while remaining:
            parents = [parent for parent, *_ in remaining.pop()._parents if parent not in found]
            found += parents
            remaining += parents
        return found

    def _insert(self, routes):
        """Add routes here and in all routers that include this one: in all or in none."""
        placements = [placement for route in routes for placement in self._placements(route)]
        claimed = {}
        for router, route in placements:
            router._check(route, claimed)
        for router, route in placements:
            router._routes.append(route)
            router._tree_of(route).add(route)
            router._found.clear()
            router._remembers &= all(part[1] in _CONVERTERS.values() for part in [*route.parts, *(route.host_parts or ())]
                                     if isinstance(part, tuple))
            if route.name:
                router._named[route.name] = route
            if router._hosts:
                router._whole = {}

    def _placements(self, route):
        yield self, route
        for parent, *where in self._parents:
            yield from parent._placements(route._below(*where))

    def _tree_of(self, route):
        """The tree of the route's host, made if there is none."""
        if route.host_parts is None:
            return self._tree
        key = tuple(part if isinstance(part, str) else part[1] for part in route.host_parts)
        if key not in self._hosts:
            self._hosts[key] = _Tree()
            self._hosts = dict(sorted(self._hosts.items(), key=lambda item: [
                (-1, label) if isinstance(label, str) else (label.rank, label.name) for label in item[0]]))
        return self._hosts[key]

    def _check(self, route, claimed):
        """Raise ValueError if something is taken, by a route that is here or by one that is to be added with it (`claimed`)."""
        node = self._tree_of(route).node(route.parts)
        for method in route.methods or ("mount",):
            other = node.mount if route.is_mount else node.routes.get(method)
            if other is None or not route.is_mount and method not in other.methods:         # GET's HEAD may be taken
                other = claimed.get((node, method))
            if other is not None:
                raise ValueError(f"{route}, {_shown_handler(route.handler)}: {method} of this path is taken by {other}, "
                                 f"{_shown_handler(other.handler)}")
            claimed[node, method] = route
        if route.name is not None:
            if not isinstance(route.name, str) or not route.name:
                raise TypeError(f"{route}: name={route.name!r}: give a str, or None")
            other = self._named.get(route.name) or claimed.get((self, route.name))
            if other is not None:
                raise ValueError(f"{route}: the name {route.name!r} is taken by {other}; include(name=) makes names of its own")
            claimed[self, route.name] = route

    # -- finding

    def find(self, method, path, host=None):
        """Who answers: a Match, whose `status` says whether there is a handler.

        200   await match.handler(request, **match.arguments)
        204   OPTIONS, and no handler for it: answer with `allow`
        308   redirect to `location` (and the query, which this does not know)
        400   the path is none: it does not begin with "/", has a bad "%", or is no UTF-8, or has a NUL, once it is decoded
        404   nobody has such a path
        405   somebody has, but not this method: answer with `allow`

        path: from the request target, still encoded, without the query; "*" is taken with OPTIONS. It is decoded once, and "%2F"
        does not divide segments. host: the Host field as it came, or None; a port, upper case and a dot at its end do not count.
        """
        return self._whole.get(path, _NO_METHODS).get(method) or self._found.get((method, path)) or self._find(method, path, host)

    def _find(self, method, path, host):
        segments, slash = path.split("/"), 0
        if "%" in path:
            segments, slash = _decoded(path, segments)
        if len(segments) < 2 or segments[0] or not path.isascii() or "\0" in path:
            return self._all_methods() if path == "*" and method == "OPTIONS" else _BAD_PATH
        if not self._hosts:             # what follows is _search() written out: a seventh of the time of a path with parameters
            found = self._tree.search(segments, slash, method)
            if type(found) is Match:
                if len(path) <= FOUND_PATH and self._remembers:
                    if len(self._found) >= FOUND_PATHS:
                        self._found.clear()
                    self._found[method, path] = found
                return found
            match = _answer(method, segments, *found)
        else:
            match = self._search(method, segments, slash, host)
        if match is _NOT_FOUND and self.redirect_slashes and segments[1]:       # "//…" would be taken for a host
            segments = [*segments, ""] if segments[-1] else segments[:-1]
            if self._search(method, segments, slash, host).status == 200:
                return _Answer(308, location="/".join(map(_quoted, segments)))
        return match

    def _search(self, method, segments, slash, host):
        allowed = None
        for tree, values in self._trees(host):
            found = tree.search(segments, slash, method, values)
            if type(found) is Match:
                return found
            methods, mount = found
            if methods:
                allowed = {*(allowed or ()), *methods}
            elif mount and not allowed:
                return _answer(method, segments, None, mount)
        return _answer(method, segments, allowed, None)

    def _trees(self, host):
        """The trees for a host, the most specific first, each with the values of the host's parameters."""
        found = _AUTHORITY.fullmatch(host or "")
        labels = found[1].lower().removesuffix(".").split(".") if found else []
        pairs = [(tree, _host_values(parts, labels)) for parts, tree in self._hosts.items() if len(parts) == len(labels)]
        return [*(pair for pair in pairs if pair[1] is not None), (self._tree, ())]

    def _all_methods(self):
        methods = {method for route in self._routes for method in route.methods}
        return _Answer(204, allow=_allow(methods | ({"HEAD"} if "GET" in methods else set())))

    # -- listing

    def routes(self):
        """All routes, those of included routers too, in the order in which they were added: a list of Route."""
        return list(self._routes)

    def url_for(self, name, /, **params):
        """The path of the route of that name, percent-encoded; "//host/path" if the route has a host.

        Parameters that the path does not have become the query: a list gives one field for each item, None gives none, True and
        False are "true" and "false". KeyError: there is no such name; ValueError: a parameter is missing, or is none that the
        path takes back.
        """
        if name not in self._named:
            raise KeyError(f"no route is called {name!r}; there are {', '.join(sorted(self._named)) or 'none with a name'}")
        path, others = self._named[name]._url(params)
        fields = [(key, flowcoro_schema.as_text(item)) for key, value in others.items() if value is not None
                  for item in (value if isinstance(value, (list, tuple)) else [value])]
        return f"{path}?{urllib.parse.urlencode(fields)}" if fields else path


def _answer(method, segments, methods, mount):
    """What a search gives that has found no route: `methods` of others at that path, or None, and a mount, or None."""
    if methods:
        return _Answer(204 if method == "OPTIONS" else 405, allow=_allow(methods))
    if mount is None:
        return _NOT_FOUND
    route, values, at = mount
    rest = "".join(["/" + segment for segment in segments[at:]])
    return Match(route, dict(zip(route.names, (*values, rest))))


def _allow(methods):
    return ", ".join(sorted({*methods, "OPTIONS"}))


def _host_values(parts, labels):
    """The values of the parameters of a host; None when it does not match."""
    values = []
    for part, label in zip(parts, labels):
        if not isinstance(part, str):
            values.append(part.value(label) if label else None)
        elif part != label:
            return None
    return None if None in values else tuple(values)


def _decoded(path, segments):
    """The segments decoded, and which is the last that has a "/" of its own (0: none). No segments when that cannot be."""
    slash = 0
    if _bad_escape_of_text(path):
        return (), 0
    try:
        for at, segment in enumerate(segments):
            if "%" in segment:
                segments[at] = segment = urllib.parse.unquote_to_bytes(segment).decode()
                if "\0" in segment:
                    return (), 0
                if "/" in segment:
                    slash = at
    except UnicodeDecodeError:
        return (), 0
    return segments, slash


# ---- OpenAPI --------------------------------------------------------------------------------------------------
#
# The document is made from what the routes know, when it is asked for; nothing is kept. OpenAPI 3.1 takes JSON Schema 2020-12
# as it is. Two things it cannot say: that two patterns of the same shape differ by their converters, or by their host. Of
# those the first stands for all, and its description names the others.

_OPERATIONS = ("GET", "PUT", "POST", "DELETE", "OPTIONS", "HEAD", "PATCH", "TRACE")

_UNPROCESSABLE = {
    "type": "object", "required": ["status", "title", "errors"],
    "properties": {
        "status": {"type": "integer"}, "title": {"type": "string"},
        "errors": {"type": "array", "items": {
            "type": "object", "required": ["in", "path", "expected", "got"],
            "properties": {"in": {"enum": ["body", "query"]}, "path": {"type": "string"}, "expected": {"type": "string"},
                           "got": {"type": "string"}}}}}}


def openapi(router, *, title="API", version="1", description="", servers=()):
    """The OpenAPI 3.1 document of a router's routes, to be made JSON: a dict.

    Of each handler it has the docstring (first line: summary; the rest: description), the parameters of the path and the query,
    the body, and what the return annotation says: a type of JSON, str, bytes, None (204), or tuple[int, ...] (status, body), with
    Literal[201] for the int to name the status. Dataclasses are components; a string in Annotated[...] is a description. Mounts,
    and routes with documented=False, are left out. servers: URLs.
    """
    components, paths, shapes, identifiers = flowcoro_schema.Schemas({"UnprocessableContent": _UNPROCESSABLE}), {}, {}, set()
    for route in router.routes():
        if not route.documented:
            continue
        shape = tuple(part if isinstance(part, str) else None for part in route.parts)
        template, names = shapes.setdefault(shape, (_template(route), _names_of(route.parts)))
        item = paths.setdefault(template, {})
        for method in route.methods:
            if method not in _OPERATIONS:
                continue
            if method.lower() in item:
                first = item[method.lower()]
                first["description"] = f"{first.get('description', '')}\n\nAlso: {route}".strip()
            else:
                item[method.lower()] = _operation(route, method, names, components, identifiers)
    info = {"title": title, "version": version, **({"description": description} if description else {})}
    document = {"openapi": "3.1.0", "info": info, "paths": {path: item for path, item in paths.items() if item}}
    if servers:
        document["servers"] = [{"url": url} for url in servers]
    if not any("422" in operation["responses"] for item in paths.values() for operation in item.values()):
        del components.schemas["UnprocessableContent"]
    if components.schemas:
        document["components"] = {"schemas": components.schemas}
    return document


def _template(route):
    return "".join("/" + (part if isinstance(part, str) else f"{{{part[0]}}}") for part in route.parts)


def _operation(route, method, names, components, identifiers):
    """An Operation Object. names: of the path's parameters, as the first route of this shape has them."""
    plan = route.plan
    summary, _, rest = inspect.cleandoc(inspect.getdoc(route.handler) or "").partition("\n")
    name = route.name or getattr(route.handler, "__name__", type(route.handler).__name__)
    choices = itertools.chain([name, f"{name}_{method.lower()}"], (f"{name}_{number}" for number in itertools.count(2)))
    operation = {"operationId": next(choice for choice in choices if choice not in identifiers)}
    identifiers.add(operation["operationId"])
    if summary:
        operation["summary"] = summary
    if rest.strip():
        operation["description"] = rest.strip()
    if route.host_parts is not None:
        operation["servers"] = [_server(route)]
    converters = [part[1] for part in route.parts if isinstance(part, tuple)]
    parameters = [{"name": name, "in": "path", "required": True, "schema": dict(converter.schema)}
                  for name, converter in zip(names, converters)]
    for field in plan.query:
        schema = field.schema(components)
        described = {"description": schema.pop("description")} if field.description else {}
        parameters.append({"name": field.name, "in": "query", "required": field.default is flowcoro_schema.MISSING, **described,
                           "schema": schema})
    if parameters:
        operation["parameters"] = parameters
    if plan.body is not None:
        content = {"application/json": {"schema": plan.body.kind.schema(components)}}
        described = {"description": plan.body.description} if plan.body.description else {}
        operation["requestBody"] = {**described, "required": plan.body.default is flowcoro_schema.MISSING, "content": content}
    operation["responses"] = _responses(plan, components)
    return operation


def _server(route):
    url = "//" + ".".join(part if isinstance(part, str) else f"{{{part[0]}}}" for part in route.host_parts)
    variables = {name: {"default": name} for name in _names_of(route.host_parts)}
    return {"url": url, "variables": variables} if variables else {"url": url}


def _responses(plan, components):
    status, returned = "200", plan.returns()
    if typing.get_origin(returned) is tuple and len(typing.get_args(returned)) == 2:
        number, returned = typing.get_args(returned)
        codes = typing.get_args(number) if typing.get_origin(number) is typing.Literal else ()
        status = str(codes[0]) if len(codes) == 1 and type(codes[0]) is int and 100 <= codes[0] <= 599 else "2XX"
    elif returned is type(None):
        status = "204"
    content = _content(flowcoro_schema.bare(returned), components)
    phrase = http.HTTPStatus(int(status)).phrase if status in map(str, http.HTTPStatus) else "Success"
    responses = {status: {"description": flowcoro_schema.description_of(returned) or phrase,
                          **({"content": content} if content else {})}}
    if plan.body is not None:
        responses["400"] = {"description": "The body is no JSON"}
        responses["415"] = {"description": "The body is not declared to be JSON"}
    if plan.body is not None or plan.query:
        responses["422"] = {"description": "A field or a parameter is not what it should be", "content": {
            "application/problem+json": {"schema": {"$ref": "#/components/schemas/UnprocessableContent"}}}}
    return responses


def _content(returned, components):
    """The media types of what a handler returns, when its annotation says so."""
    if returned in (str, bytes):
        media_type = "text/plain" if returned is str else "application/octet-stream"
        return {media_type: {"schema": {"type": "string"} if returned is str else {}}}
    try:
        kind = None if returned is type(None) else flowcoro_schema.kind_of(returned)
    except TypeError:                           # a Response, an iterator, nothing at all
        return {}
    return {"application/json": {"schema": kind.schema(components)}} if kind else {}


# -- the page

# What a page of ours may do: no scripts, nothing from elsewhere, and its style, which is in it. security_headers() keeps it.
_CSP_OF_PAGES = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"

_STYLE = """
:root { color-scheme: light dark; --line: #8885; --soft: #8882; --link: #0a58ca; }
@media (prefers-color-scheme: dark) { :root { --link: #7ab7ff; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
a { color: var(--link); } code, pre { font: 0.9em/1.4 ui-monospace, monospace; } pre { white-space: pre-wrap; margin: 0.5rem 0; }
details { border: 1px solid var(--line); border-radius: 6px; margin: 0.5rem 0; } details > div { padding: 0 1rem 0.5rem; }
summary { padding: 0.5rem 1rem; cursor: pointer; } summary b { display: inline-block; min-width: 5rem; }
summary:focus-visible, a:focus-visible { outline: 3px solid var(--link); }
table { border-collapse: collapse; width: 100%; } caption { text-align: left; font-weight: bold; padding: 0.5rem 0; }
th, td { border-bottom: 1px solid var(--line); padding: 0.25rem 0.5rem; text-align: left; vertical-align: top; }
thead { background: var(--soft); } h3 { margin: 1rem 0 0.25rem; } .text { white-space: pre-line; }
"""


def openapi_page(document, *, url=""):
    """An OpenAPI document, as openapi() makes it, as a page of HTML: a str that needs nothing else, no script, and no network.

    url: where the document itself is, for a link to it.
    """
    info, escape = document["info"], html.escape
    operations = [_operation_html(path, method, operation) for path, item in document["paths"].items()
                  for method, operation in item.items()]
    schemas = [_schema_html(name, schema) for name, schema in document.get("components", {}).get("schemas", {}).items()]
    link = f'<p><a href="{escape(url)}">OpenAPI {escape(document["openapi"])} document</a></p>' if url else ""
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(info["title"])}</title><style>{_STYLE}</style></head>
<body><header><h1>{escape(info["title"])} <small>{escape(info["version"])}</small></h1>
<p class="text">{escape(info.get("description", ""))}</p>{link}</header>
<main><section aria-labelledby="operations"><h2 id="operations">Operations</h2>
{"".join(operations) or "<p>There are none.</p>"}</section>
{f'<section aria-labelledby="schemas"><h2 id="schemas">Schemas</h2>{"".join(schemas)}</section>' if schemas else ""}
</main></body></html>
"""


def _operation_html(path, method, operation):
    escape = html.escape
    body = [f'<p class="text">{escape(operation.get("description", ""))}</p>'] if operation.get("description") else []
    body += [f"<p>At <code>{escape(server['url'])}</code></p>" for server in operation.get("servers", ())]
    rows = [(parameter["name"], f"{parameter['in']}, {'required' if parameter['required'] else 'optional'}",
             parameter["schema"], parameter.get("description", "")) for parameter in operation.get("parameters", ())]
    if rows:
        body.append(_table("Parameters", "Where", rows))
    if "requestBody" in operation:
        required = "" if operation["requestBody"]["required"] else " (optional)"
        body.append(f"<h3>Body{required}</h3>" + _content_html(operation["requestBody"]))
    body.append("<h3>Responses</h3><ul>")
    for status, response in operation["responses"].items():
        body.append(f"<li><b>{escape(status)}</b> {escape(response['description'])} {_content_html(response)}</li>")
    return (f'<details id="operation-{escape(operation["operationId"])}"><summary><b>{escape(method.upper())}</b> '
            f'<code>{escape(path)}</code> {escape(operation.get("summary", ""))}</summary>'
            f'<div>{"".join(body)}</ul></div></details>\n')


def _content_html(holder):
    return "".join(f"<div><code>{html.escape(media_type)}</code>: {_type_html(content['schema'])}</div>"
                   for media_type, content in holder.get("content", {}).items())


def _table(caption, second, rows):
    body = "".join(f'<tr><th scope="row"><code>{html.escape(name)}</code></th><td>{html.escape(where)}</td>'
                   f'<td>{_type_html(schema)}</td><td class="text">{html.escape(text)}</td></tr>'
                   for name, where, schema, text in rows)
    head = "".join(f'<th scope="col">{title}</th>' for title in ("Name", second, "Type", "Description"))
    return f"<table><caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _schema_html(name, schema):
    required = schema.get("required", ())
    rows = [(field, "required" if field in required else "optional", inner, inner.get("description", ""))
            for field, inner in schema.get("properties", {}).items()]
    return (f'<article id="schema-{html.escape(name)}"><h3>{html.escape(name)}</h3>'
            f'<p class="text">{html.escape(schema.get("description", ""))}</p>{_table("Fields", "Given", rows)}</article>\n')


def _type_html(schema):
    """A schema in a line, with links to those it refers to."""
    escape = html.escape
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        text = f'<a href="#schema-{name}">{name}</a>'
    elif "anyOf" in schema:
        text = " or ".join(map(_type_html, schema["anyOf"]))
    elif "enum" in schema:
        text = "one of " + ", ".join(f"<code>{escape(json.dumps(value))}</code>" for value in schema["enum"])
    elif schema.get("type") == "array":
        text = f"array of {_type_html(schema['items'])}"
    elif isinstance(schema.get("additionalProperties"), dict):
        text = f"object of {_type_html(schema['additionalProperties'])}"
    else:
        text = escape(str(schema.get("type", "anything")))
        text += f" ({escape(str(schema['format']))})" if "format" in schema else ""
    if "default" in schema:
        text += f", default <code>{escape(json.dumps(schema['default']))}</code>"
    return text


# ---- messages -------------------------------------------------------------------------------------------------
#
# What a handler gets and gives; a client's response is a Response, too. Neither knows how it travels: what has not been read yet
# is asked of a source, an object with `async receive_body(turn)` that gives the next piece of the content, b"" at its end; `turn`
# says whose, as a request may be kept for longer than its answer takes, and by then what comes is the next one's.
#
# What nearly no handler looks at is made when it is asked for: class attributes stand for what has not been. (Eleven attributes
# fewer to set are 0.3 of the 0.8 µs that a Request takes.)

# Bytes of a body that body(), json() and form() take at most unless they are told otherwise; the server's max_body is for streams
# as well. nginx 1 MiB, aiohttp 2 MiB, Django 2.5 MB, Go none.
MAX_BODY = 16 * 2**20

# Bytes of a file in a form up to which it stays in memory; beyond, it lies in a temporary file. Django 2.5 MB, starlette 1 MiB.
# And bytes of all files of a form that stay there, and files in one form at most (Django 100): each may be an open file.
SPOOLED, SPOOLED_IN_ALL, MAX_FILES = 2**20, 4 * 2**20, 100

_TEXT, _BINARY, _JSON = "text/plain; charset=utf-8", "application/octet-stream", "application/json"
_STATELESS = frozenset([204, 205, 304])
_FORM_TYPES = "multipart/form-data", "application/x-www-form-urlencoded"


class Fields:
    """The fields of a query or a form: names in order, any number of values each. As Headers, but names are exact.

    Made from (name, value) pairs. Iterating gives the names, each once; len() counts them; `in` asks for one.
    """

    __slots__ = ("_pairs", "_first")

    def __init__(self, pairs=()):
        self._pairs = pairs = list(pairs)
        self._first = dict(reversed(pairs))

    def __getitem__(self, name):
        """The first value of that name; KeyError if there is none."""
        return self._first[name]

    def get(self, name, default=None):
        """The first value of that name, or `default`."""
        return self._first.get(name, default)

    def get_all(self, name):
        """All values of that name, in order: a list, perhaps an empty one."""
        return [value for other, value in self._pairs if other == name] if name in self._first else []

    def items(self):
        """All (name, value) in order, a new list."""
        return list(self._pairs)

    def __iter__(self):
        return iter(dict(self._pairs))

    def __contains__(self, name):
        return name in self._first

    def __len__(self):
        return len(self._first)

    def __eq__(self, other):
        return self._pairs == other._pairs if isinstance(other, Fields) else NotImplemented

    __hash__ = None

    def __repr__(self):
        return f"Fields({self._pairs!r})"


class FormFile:
    """A file of a form that has been received: `name` of the field, `filename` as the client says (see safe_filename()),
    `media_type` (str or None), `headers`, `size` in bytes, and `file`, a binary file at its beginning, which is in memory up to
    SPOOLED bytes and a temporary file beyond. It is closed when the request has been answered.
    """

    def __init__(self, part, room=SPOOLED):
        self.name, self.filename, self.media_type, self.headers = part.name, part.filename, part.media_type, part.headers
        self._room = max(1, min(room, SPOOLED))         # (0 would be no limit)
        self.size, self.file = 0, tempfile.SpooledTemporaryFile(self._room)

    @property
    def _in_memory(self):
        return self.size <= self._room

    async def _write(self, data):
        self.size += len(data)
        await (_done(self.file.write(data)) if self._in_memory else flowcoro.to_thread(self.file.write, data))

    async def read(self, max_bytes=-1):
        """The next bytes, all by default; b"" at the end."""
        return self.file.read(max_bytes) if self._in_memory else await flowcoro.to_thread(self.file.read, max_bytes)

    async def save(self, path):
        """Write all of it to a file of that path, in a thread; one that is there is overwritten. OSError."""
        def copy():
            self.file.seek(0)
            with open(path, "wb") as target:
                shutil.copyfileobj(self.file, target)
        await flowcoro.to_thread(copy)

    def __repr__(self):
        return f"<FormFile {self.name!r} {self.filename!r}, {self.size} bytes>"


async def _done(value):
    return value


class Part:
    """A part of a multipart body while it is received: `name`, `filename` (None: no file; see safe_filename()), `media_type` (str
    or None), `headers`. `async for data in part` gives its content; what is not read is skipped when the next part is asked for.
    """

    def __init__(self, begin, pieces):
        self.name, self.filename, self.media_type, self.headers = begin.name, begin.filename, begin.content_type, begin.headers
        self._pieces = pieces           # an async generator that gives this part's data, then ends

    def __aiter__(self):
        return self._pieces

    async def read(self, max_bytes=MAX_BODY):
        """All of its content that has not been read. HttpError (413) for more than `max_bytes`."""
        pieces, size = [], 0
        async for data in self._pieces:
            size += len(data)
            if size > max_bytes:
                raise HttpError(413, f"the field {self.name!r:.80} has more than {max_bytes} bytes")
            pieces.append(data)
        return b"".join(pieces)

    def __repr__(self):
        return f"<Part {self.name!r}{'' if self.filename is None else f' {self.filename!r}'}>"


def _its_websocket(request):
    """The WebSocket that its connection has become, or None. Who makes one of it sets this: then it is closed when the server
    ends, by its close_nowait(1001), and that a handler fails because it was closed is not reported."""
    return None if request._source is None else request._source.websocket


def _becomes_websocket(request, ws):
    if request._source is not None:
        request._source.websocket = ws
        if request.closing.is_set():
            ws.close_nowait(1001)


def _too_late():
    return RuntimeError("the request has been answered: what its connection has now is the next one's (body() keeps a content "
                        "that is read before)")


class _Content:
    """The content of a Request, whose `headers` say what it is: how it is read, and what is kept of it."""

    content = trailers = max_body = None
    _source = _turn = _form = _files = _arrived = None      # (_arrived: the content, if all of it came with the head)
    _begun = False

    async def body(self, max_bytes=None):
        """The whole content, bytes, kept for the next call. HttpError (413) for more than `max_bytes`, or the server's max_body,
        whichever is less. None: 16 MiB, as it is all in memory; give more if you expect more, or take stream()."""
        content = self._content_here(max_bytes)
        return await self._wait_for_content(max_bytes) if content is None else content

    def _content_here(self, max_bytes):
        """body(), without a coroutine, where all of it is here, as mostly when the handler asks; else None."""
        content = self.content
        if content is None:
            limit, content = self._limit(max_bytes), self._arrived
            announced = self.headers.get("content-length") if content is None else len(content)
            if announced is not None and int(announced) > limit:
                raise self._too_large(limit)
            self._begin()
            if content is None:
                content = self._source.receive_content()
            self.content = content
        elif max_bytes is not None and len(content) > max_bytes:
            raise self._too_large(max_bytes)
        return content

    async def _wait_for_content(self, max_bytes):
        """body(), piece by piece."""
        pieces, size, limit, receive, turn = [], 0, self._limit(max_bytes), self._source.receive_body, self._turn
        while data := await receive(turn):
            size += len(data)
            if size > limit:
                raise self._too_large(limit)
            pieces.append(data)
        self._end()
        self.content = b"".join(pieces)
        return self.content

    def _limit(self, max_bytes):
        if max_bytes is None:
            max_bytes = MAX_BODY
        return max_bytes if self.max_body is None else min(max_bytes, self.max_body)

    @staticmethod
    def _too_large(limit):
        return HttpError(413, f"the content has more than {limit} bytes, which is what is taken here (max_bytes, max_body)")

    def _begin(self):
        if self._begun or self._source is None:
            raise RuntimeError("the content of this request is being read or has been, by stream() or multipart(); it comes "
                               "once. body() keeps it, and can be called again")
        if self._source.turn != self._turn:
            raise _too_late()
        self._begun = True

    def _end(self):
        self.trailers, self._source.trailers = self._source.trailers, None

    async def stream(self):
        """`async for data in request.stream()`: the content as it comes, bytes. With max_body (body_limit()) 413 beyond it."""
        if self.content is not None:
            if self.content:
                yield self.content
            return
        self._begin()
        left = sys.maxsize if self.max_body is None else self.max_body
        receive, turn = self._source.receive_body, self._turn
        data, self._arrived = self._arrived or await receive(turn), None
        while data:
            left -= len(data)
            if left < 0:
                raise self._too_large(self.max_body)
            yield data
            data = await receive(turn)
        self._end()

    async def json(self, *, max_bytes=None):
        """The content as JSON (RFC 8259: no NaN, no name twice). HttpError: 415 if its Content-Type is another, 400, 413."""
        content = self._content_here(max_bytes)
        if content is None:
            content = await self._wait_for_content(max_bytes)
        return _json_of(self, content, flowcoro_schema.JSON_DEPTH)

    async def form(self, *, max_bytes=MAX_FORM_BYTES, max_file_bytes=MAX_FILE_BYTES, max_parts=MAX_PARTS, max_files=MAX_FILES):
        """The fields of a form: Fields, whose values are str, or FormFile for files. It may be called again.

        max_bytes: of all that is no file, together; max_file_bytes: of each file; of all files 4 MiB are kept in memory, the
        others lie on disk. max_parts: fields and files; max_files: of these, files. HttpError: 415 for another Content-Type, 413
        beyond a limit, 400 for what is malformed or no UTF-8.
        """
        if self._form is None:
            media = self.media_type
            if media is None or media.essence not in _FORM_TYPES:
                raise HttpError(415, f"a form is expected: {' or '.join(_FORM_TYPES)}")
            if media.essence == "application/x-www-form-urlencoded":
                content = await self.body(max_bytes)
                self._form = Fields(_parse_urlencoded(content, max_fields=max_parts, max_bytes=max_bytes, limit="max_parts"))
            else:
                pairs = self._parts_kept(max_bytes, max_file_bytes, max_parts, max_files)
                self._form = Fields([pair async for pair in pairs])
        return self._form

    async def _parts_kept(self, max_bytes, max_file_bytes, max_parts, max_files):
        left, files, room = max_bytes, 0, SPOOLED_IN_ALL
        async for part in self.multipart(max_field_bytes=max_bytes, max_file_bytes=max_file_bytes, max_parts=max_parts):
            if part.filename is None:
                try:
                    content = await part.read(left)
                    left -= len(content)
                    yield part.name, content.decode()
                except UnicodeDecodeError:
                    raise ProtocolError(400, f"the field {part.name!r:.80} is no UTF-8") from None
            elif files == max_files:
                raise HttpError(413, f"a form of more than {max_files} files (max_files)")
            else:
                file = self._keep(FormFile(part, room))
                async for data in part:
                    await file._write(data)
                file.file.seek(0)
                files += 1
                if file._in_memory:
                    room -= file.size
                yield part.name, file

    def _keep(self, file):
        """Have a FormFile closed after the answer, or when there will be none."""
        if self._files is None:
            self._files = []
            if self._source is not None:
                self._source.with_files = self
        self._files.append(file)
        return file

    def _close(self):
        """After the answer: temporary files go."""
        for file in self._files:
            with contextlib.suppress(OSError):          # the disk is full; nobody wants it any more
                file.file.close()
        if self._source is not None:
            self._source.with_files = None

    async def multipart(self, **limits):
        """`async for part in request.multipart()`: the parts of a multipart/form-data body, as they come: each a Part.

        Limits, in bytes but for max_parts: max_parts, max_head_bytes, max_field_bytes (of a part without a filename),
        max_file_bytes, max_total_bytes. HttpError: 415 for another Content-Type, 413 beyond a limit, 400 for what is malformed.
        """
        media_type = self.headers.get("content-type")
        if media_type is None:
            raise HttpError(415, "there is no Content-Type; that of a form is multipart/form-data")
        parser = _MultipartParser(_multipart_boundary(media_type), **limits)
        stream, begun = self.stream(), []

        async def next_event():
            while (event := parser.next_event()) is NEED_DATA:
                parser.receive_data(await anext(stream, b""))
            return event

        async def pieces():
            while type(event := await next_event()) is _PartData:
                yield event.data

        async with contextlib.aclosing(stream):
            while type(event := await next_event()) is not _FormEnd:
                begun = pieces()
                yield Part(event, begun)
                async for _ in begun:                   # what nobody wanted
                    pass


class Request(_Content):
    """A request, as a handler gets it.

    `method`; `target` as sent; `headers`, a Headers; `version`, "1.1" or "1.0"; `raw_path`, `query_string`: what stands before
    and after the "?" of the target, as sent; `params`: the parameters of the path, {name: value}; `route`, a Route or None;
    `app`, the HttpServer; `client` and `server`: addresses of both ends, (host, port), or a path or None on a Unix socket;
    `scheme`, "http" or "https"; `tls`, the version of TLS or None; `state`: whatever you like to keep here (a SimpleNamespace).
    Attributes may be set: a middleware that knows the proxies sets `client`, `scheme` and `host`.

    Its content is received when it is asked for, and once: by body(), json() and form(), which keep it, or by stream() or
    multipart(), which do not. Only then is a client that waits for it told to send it (Expect: 100-continue). Errors of all of
    these: ProtocolError for what the client sends that is no HTTP or too much; HttpError (408) if it sends too slowly;
    BrokenError if it is gone; RuntimeError when the request has been answered. Cancelled: what was received is lost.

    Made by hand, for tests: Request("POST", "/x?y=1", [("Content-Type", "text/plain")], b"content").
    """

    params, route, app, version = _NOTHING, None, None, "1.1"
    _query = _cookies = _state = _client = _server = _scheme = _host = None
    _line = _fields = None              # a _KnownLine, a _KnownFields
    _deadlines = ()                     # scopes of timeout(): upgrade() lifts them

    def __init__(self, method, target, headers=(), content=b"", *, version="1.1", client=None, server=None, scheme="http"):
        self.method, self.target, self.version = method, target, version
        self.headers = headers if isinstance(headers, Headers) else Headers(headers)
        self.raw_path, _, self.query_string = target.partition("?")
        self.content, self._client, self._server, self._scheme = content, client, server, scheme

    # -- the head

    @property
    def path(self):
        """The path, percent-decoded; what is no UTF-8 in it is U+FFFD. To compare paths use raw_path, in which %2F is no "/"."""
        raw_path = self.raw_path
        return urllib.parse.unquote(raw_path) if "%" in raw_path else raw_path

    @property
    def query(self):
        """The Fields of the query. ProtocolError: 400 for a bad "%" or no UTF-8, 413 for more than the max_query_fields."""
        query = self._query
        if query is None:
            most, line = MAX_FORM_FIELDS if self.app is None else self.app.max_query_fields, self._line
            known = line is not None and self.query_string is line.query_string     # nobody has set another one
            if known and line.query is not None and len(line.query._pairs) <= most:
                query = line.query
            else:
                query = Fields(_parse_urlencoded(self.query_string, max_fields=most, limit="max_query_fields")
                               if self.query_string else ())
                if known and len(query._pairs) <= KNOWN_QUERY:
                    line.query = query
            self._query = query
        return query

    @property
    def cookies(self):
        """{name: value} of the Cookie fields. ProtocolError (431) for more than the server's max_cookies."""
        cookies = self._cookies
        if cookies is None:
            fields = self._fields
            if fields is None or self.headers._entries is not fields.entries:       # else nobody has changed them
                cookies = self._read_cookies()
            else:
                if fields.cookies is None:
                    fields.cookies = self._read_cookies()
                cookies = fields.cookies.copy()
            self._cookies = cookies
        return cookies

    def _read_cookies(self):
        values = self.headers.get_all("cookie")
        most = MAX_COOKIES if self.app is None else self.app.max_cookies
        return _parse_cookies("; ".join(values), max_cookies=most) if values else {}

    @property
    def media_type(self):
        """The MediaType of the content, None without a Content-Type. ProtocolError (400) if that is malformed."""
        value = self.headers.get("content-type")
        return None if value is None else parse_media_type(value)

    @property
    def state(self):
        """A SimpleNamespace for what middleware and handlers want to tell each other."""
        if self._state is None:
            self._state = types.SimpleNamespace()
        return self._state

    @property
    def client(self):
        """The client's address: (host, port); None on a Unix socket."""
        if self._client is None and self._source is not None:
            self._client = self._source.client
        return self._client

    @client.setter
    def client(self, address):
        self._client = address

    @property
    def server(self):
        """The address that the client has reached: (host, port), or the path of a Unix socket."""
        if self._server is None and self._source is not None:
            self._server = self._source.server
        return self._server

    @property
    def scheme(self):
        """ "http", or "https" with TLS."""
        if self._scheme is None:
            self._scheme = self._source.scheme if self._source is not None else "http"
        return self._scheme

    @scheme.setter
    def scheme(self, scheme):
        self._scheme = scheme

    @property
    def tls(self):
        """The version of TLS, such as "TLSv1.3"; None without."""
        return None if self._source is None else self._source.tls

    @property
    def closing(self):
        """An Event that is set when the server wants to end: what goes on for long, such as an upgraded connection, ends then."""
        return flowcoro.Event() if self._source is None else self._source.run.closing

    @property
    def host(self):
        """The host that is asked for, name[:port]: the Host field, or that of an absolute target; "" if there is none."""
        return self.headers.get("host", "") if self._host is None else self._host

    @host.setter
    def host(self, host):
        self._host = host

    websocket = property(_its_websocket, _becomes_websocket)

    @property
    def url(self):
        """The whole URL, as the client has it, as far as is known: behind a proxy by trusted_proxies() only."""
        path = self.raw_path if self.raw_path[:1] == "/" else ""        # OPTIONS * is about all of the host, CONNECT has none
        return f"{self.scheme}://{self.host}{path}{'?' * bool(self.query_string)}{self.query_string}"

    # -- more than an answer

    async def inform(self, status, headers=()):
        """Send an informational response before the answer, such as 103 Early Hints; nothing to a client of HTTP/1.0.

        ValueError for 101, which upgrade() sends, and what is no such status. Cancelled: the connection is cut.
        """
        if not 100 <= status <= 199 or status == 101:
            raise ValueError(f"inform({status!r}): a status from 100 to 199, but 101, which upgrade() sends")
        if self._source is not None:
            if self._source.turn != self._turn:
                raise _too_late()
            if self.version != "1.0":
                await self._source.inform(InformationalResponse(status, Headers(headers)))

    async def upgrade(self, protocol, headers=()):
        """Accept the client's wish to switch to another protocol, or its CONNECT (protocol None). -> the Socket, which is yours.

        101 is sent, with Connection and Upgrade; what the client has sent already can be read from the Socket. When the handler
        returns, the connection is closed; what it returns counts for nothing. `closing` is set when the server wants to end.
        HttpError: 426 if the client has not offered it, 400 if its request has a content that was not read. BrokenError.
        Cancelled: the connection is cut.
        """
        if self._source is None:
            raise RuntimeError("this request came by no connection")
        if self._source.turn != self._turn:
            raise _too_late()
        sock = await self._source.upgrade(self, protocol, headers)
        for scope in self._deadlines:
            scope.deadline = math.inf
        return sock

    def __repr__(self):
        return f"<Request {self.method} {self.target!r:.80}>"


class Response:
    """An answer: `status`, `headers` (a Headers), `content` (bytes) or else `stream` (an async iterator of bytes).

    content: str (sent as UTF-8, text/plain unless told otherwise), bytes, None for nothing, dict, list and what else JSON has
    (flowcoro_schema.json_default() says what more), or an iterator, async or not, of bytes or str, which is sent as it comes.
    `headers`: as Headers takes them. `media_type`: a Content-Type instead of the usual one for the content. `reason`: instead of
    the usual one for the status. Content-Length, and chunks where there is none, are the server's to add.

    The head of a stream is sent with its first piece (b"" will do), which says the usual type: text/plain for str; unless it is
    `endless`. An error before that is still answered as any other, for HEAD too, which asks for no more; later the connection is
    cut. `trailers`: pairs to be sent after a stream, if it goes out in
    chunks and the request has `TE: trailers`, else they are dropped; it may be set while it lasts.

    A middleware may replace `content` and `stream`; one of them is None. `endless`: a stream that the server may end when it
    closes, such as of events; its head is sent at once.
    """

    content = stream = request = reason = trailers = None
    endless = _guessed = False          # (whether the type is what a stream has before its first piece)

    def __init__(self, status=200, content=b"", headers=(), *, media_type=None, reason=None):
        if type(status) is not int:
            if not isinstance(status, int) or isinstance(status, bool):
                raise TypeError(f"Response({status!r:.80}): the status comes first, an int; then the content")
            status = int(status)            # an http.HTTPStatus
        self.status, self.reason, self.headers = status, reason, Headers(headers)
        usual = self._set(content)
        if media_type is not None or (usual is not None and "content-type" not in self.headers):
            self.headers.set("Content-Type", usual if media_type is None else str(media_type))
            if media_type is None and self.stream is not None:
                self._guessed = True

    def _set(self, content):
        """Take the content; the media type that goes without saying."""
        kind = type(content)
        if kind is str:
            self.content = content.encode()
            return _TEXT
        if kind is bytes:
            self.content = content
            return _BINARY if content else None
        if content is None:
            self.content = b""
            return None
        if isinstance(content, (str, bytes, bytearray, memoryview)):
            text = isinstance(content, str)
            self.content = content.encode() if text else bytes(content)
            return _TEXT if text else _BINARY
        if hasattr(content, "__aiter__") or hasattr(content, "__next__"):
            if inspect.isawaitable(content):        # such as flowcoro.sleep(1), a generator that is a coroutine
                raise TypeError(f"the content is {content!r:.80}, which was not awaited")
            self.stream = content if hasattr(content, "__aiter__") else _Asynchronous(content)
            return _BINARY
        self.content = flowcoro_schema.encode_json(content).encode()
        return _JSON

    @classmethod
    def redirect(cls, location, status=303, headers=()):
        """Send the client to another URL. 303: GET it; 307: the same again; 301, 308: for good. ValueError for other statuses.

        What a URL cannot have in `location`, such as blanks and control characters, is percent-encoded.
        """
        if status not in (301, 302, 303, 307, 308):
            raise ValueError(f"redirect(status={status!r}): 301, 302, 303, 307 or 308")
        location = urllib.parse.quote(location, safe="!#$%&'()*+,/:;=?@[]~-._")
        response = cls(status, b"", headers)
        response.headers.add("Location", location)
        return response

    def set_cookie(self, name, value, *, max_age=None, expires=None, domain=None, path="/", secure=False, http_only=False,
                   same_site="Lax", partitioned=False):
        """Set a cookie. `max_age` in seconds, `expires` a timestamp; with neither it lasts until the browser is closed.

        `path`: None is the folder of the request. `same_site`: "Strict", "Lax", "None", or None to leave it out. ValueError for
        what has no place in a cookie, and for what browsers would drop (RFC 6265, and 6265bis).
        """
        self.headers.add("Set-Cookie", _set_cookie(
            name, value, max_age=max_age, expires=expires, domain=domain, path=path, secure=secure, http_only=http_only,
            same_site=same_site, partitioned=partitioned))

    def delete_cookie(self, name, **attributes):
        """Have the client forget a cookie; domain, path and partitioned as they were when it was set."""
        self.headers.add("Set-Cookie", _delete_cookie(name, **attributes))

    @property
    def media_type(self):
        """The MediaType of the content, None without a Content-Type. ProtocolError (400) if that is malformed."""
        value = self.headers.get("content-type")
        return None if value is None else parse_media_type(value)

    def __repr__(self):
        return f"<Response {self.status}, {'a stream' if self.content is None else f'{len(self.content)} bytes'}>"


class _Asynchronous:
    """An iterator as an asynchronous one. Whoever has it closes it: a generator, or a file, even if nothing was asked of it."""

    __slots__ = ("iterator",)

    def __init__(self, iterator):
        self.iterator = iterator

    def __aiter__(self):
        return self

    async def __anext__(self):
        try:
            return next(self.iterator)
        except StopIteration:
            raise StopAsyncIteration from None

    async def aclose(self):
        if hasattr(self.iterator, "close"):
            self.iterator.close()


# Fields that are about one connection, and not about what it carries (RFC 9110 7.6.1).
_HOP_BY_HOP = frozenset(["connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer",
                         "transfer-encoding", "upgrade"])


def _as_response(result):
    """What a handler has returned, as a Response. TypeError for what is none."""
    kind = type(result)
    if kind is Response:
        return result
    if kind is tuple:
        if not 2 <= len(result) <= 3 or not isinstance(result[0], int):
            raise TypeError(f"a handler has returned the tuple {result!r:.80}; (status, content) or (status, content, headers)")
        return Response(*result)
    if result is None:
        return Response(204)
    if isinstance(result, Response):
        return result if result.request is None else _relayed(result)
    return Response(200, result)


class _Relay:
    """The content of an answer that has come from elsewhere, as a stream."""

    __slots__ = ("response",)

    def __init__(self, response):
        self.response = response

    def __aiter__(self):
        return aiter(self.response)

    async def aclose(self):
        await self.response.close()


def _relayed(response):
    """A ClientResponse as an answer of ours: without what is said there about its connection, and with its content as decoded."""
    named = _option_set(response.headers._combined("connection"))
    decoded = response._decoder is not None
    dropped = _HOP_BY_HOP.union(named, ("content-encoding", "content-length") if decoded else ())
    content = _Relay(response) if response.content is None else response.content
    relayed = Response(response.status, content, [pair for pair in response.headers if pair[0].lower() not in dropped])
    if "content-type" not in response.headers:
        relayed.headers.remove("content-type")
    return relayed


class _FileStream:
    """A part of an open binary file as the stream of a Response: `count` bytes from `offset`. The server sends it by the system,
    others iterate it. aclose() closes the file, which is its own, and calls with the bytes sent what is in `done`.
    """

    def __init__(self, file, offset, count):
        self.file, self.offset, self.count, self.sent, self.done = file, offset, count, 0, []

    async def __aiter__(self):
        file, offset, left = self.file, self.offset, self.count
        while left:
            data = await flowcoro.to_thread(_read_at, file, offset, min(left, CHUNK))
            offset, left = offset + len(data), left - len(data)
            self.sent += len(data)
            yield data

    async def aclose(self):
        self.file.close()
        while self.done:
            self.done.pop(0)(self.sent)

    def __del__(self):                  # of an answer that was not sent, because a middleware put another in its place
        self.file.close()


def _read_at(file, offset, count):
    """`count` bytes of a file. OSError if they are not there any more."""
    file.seek(offset)
    pieces, left = [], count
    while left:
        pieces.append(piece := file.read(left))
        if not piece:
            raise OSError(f"{file!r} has become shorter while it was sent: {left} bytes are missing from {offset}")
        left -= len(piece)
    return b"".join(pieces)


# ---- server ---------------------------------------------------------------------------------------------------
#
# A connection is one task: it reads a head, calls the handler, writes the answer, and so on. There is no task and no timer for a
# request. Deadlines are looked after by one sweep for all connections, twice a second: each connection says in `phase` what it
# waits for, and the sweep remembers when it first saw that; so a deadline costs the request an attribute.
#
#     H1  `turn` is another one with each request, 0 before the first; (turn, phase) is how the sweep knows that somebody still
#         waits for the same
#     H2  what a peer can make us wait for has a phase with a limit: a head, a body, a peer that does not read; only handlers
#         have none
#     H3  a connection goes on to the next request only when both messages are complete; else it is closed, and what was written
#         arrives, because what the peer still sends is read and dropped for a while (else the system would reset)
#     H4  whatever a handler does, its answer is one message or the connection is cut so that the peer can tell; what was sent in
#         part (a write that was cancelled) is never gone on with

# Seconds for a head from its first byte (nginx 60, Apache 20 to 40), between requests (nginx 75, Apache 5), for a body in all
# (nginx has none, Apache by rate), and without progress while an answer is sent (nginx 60).
HEAD_TIMEOUT, IDLE_TIMEOUT, BODY_TIMEOUT, SEND_TIMEOUT = 10.0, 60.0, 600.0, 60.0

# Bytes a second that a body has to come with on average, after so many seconds of waiting for it (Kestrel's 240 and 5).
MIN_BODY_RATE, BODY_GRACE = 240, 5.0

# Bytes of a body that nobody has asked for which are read, so that the connection can be used again; more, and it is closed.
MAX_UNREAD = 256 * 2**10

# Seconds, and bytes, for which a connection that we close is read on (H3): what is on its way to us comes within a round trip,
# and who goes on sending for longer has been told. nginx lingering_time 30 s, lingering_timeout 5 s.
LINGER_TIMEOUT, MAX_LINGER = 2.0, 4 * 2**20

# Seconds between two sweeps, and so how late a deadline may be; how soon a handler is cancelled when its client has gone. And
# connections that one looks at before it lets others run: a millisecond at most.
SWEEP, SWEPT_A_TURN = 0.5, 1000

# Seconds that the hooks of a shutdown have: longer than a flush takes, shorter than service managers wait (Docker 10, systemd
# 90).
SHUTDOWN_TIMEOUT = 8.0

# Seconds that a server gives what is under way when it ends, as flowcoro_net; and beyond them run() to what is cancelled then.
DRAIN_TIMEOUT, END_TIMEOUT = 8.0, 5.0

# Bytes that one read asks for. A head is a few hundred; uploads want more.
CHUNK = 64 * 2**10

_IDLE, _HEAD, _HANDLING, _BODY = "idle", "head", "handling", "body"
_SENDING, _LINGERING, _SWITCHED_TO = "sending", "lingering", "switched"

_CONTINUE = InformationalResponse(100)
_PLAIN_TYPE, _JSON_TYPE, _BINARY_TYPE = ("Content-Type", _TEXT), ("Content-Type", _JSON), ("Content-Type", _BINARY)


class _Second:
    """`date`: ("Date", …), of a second; `text` and `json`: the heads of the commonest answers in it."""

    __slots__ = ("number", "date", "text", "json")

    def __init__(self, number):
        self.number, self.date = number, ("Date", http_date(number))
        self.text, self.json = [_ReadyHead(200, (kind, self.date)) for kind in (_PLAIN_TYPE, _JSON_TYPE)]


class _Clock:
    """What the answers of a second have in common, made once."""

    __slots__ = ("second",)

    def __init__(self):
        self.second = _Second(0)

    def now(self):
        """The _Second that it is: 0.1 µs; to make a date takes 1.4, and a head 0.6."""
        number, second = int(time.time()), self.second
        if number != second.number:
            self.second = second = _Second(number)
        return second


_CLOCK = _Clock()


# What a connection has instead of its codec when another protocol is spoken on it. (The sweep of another worker may have seen it
# idle a moment before.)
_UPGRADED = types.SimpleNamespace(our_state=SWITCHED, forget_fields=lambda: None)


class _Exchange:
    """What a Request asks of its connection."""

    __slots__ = ("run", "app", "sock", "http", "client", "server", "scheme", "tls", "trailers", "with_files", "phase", "turn",
                 "seen", "since", "waited", "lasted", "received", "progress", "scope", "part", "events", "fault", "websocket",
                 "speaker")

    def __init__(self, run, sock):
        self.run, self.app, self.sock = run, run.app, sock
        self.http = HttpConnection(SERVER, **run.app._codec_limits)
        peer, local = sock.peer, sock.local
        self.client = peer[:2] if type(peer) is tuple else peer or None
        self.server = local[:2] if type(local) is tuple else local
        self.tls = sock.tls.version() if sock.tls else None
        self.scheme = "https" if sock.tls else "http"
        self.trailers = self.fault = None
        self.websocket = self.speaker = None        # what it has become; (handler, arguments) of that, for _speak()
        self.with_files = None              # a Request whose files are to be closed
        self.phase, self.turn = _IDLE, 0
        self.seen = None                    # the sweep's: (turn, phase) when it looked last,
        self.since = 0.0                    # how many seconds that has lasted,
        self.waited = self.lasted = 0.0     # those for which this body was waited for, and since that began
        self.received = self.progress = 0   # bytes of this body's content; bytes that the sweep has seen going out
        self.scope = self.part = self.events = None     # of the connection; of the wait for a body, or for an endless stream

    @property
    def upgraded(self):
        """Whether it speaks another protocol by now."""
        return self.http.our_state is SWITCHED

    def receive_content(self):
        """All that is left of the content, if it is here; else None."""
        return self.http.receive_content()

    async def receive_body(self, turn):
        """The next piece of the content, b"" at its end. HttpError (408), ProtocolError, BrokenError; RuntimeError if it is
        another turn by now."""
        http = self.http
        if turn != self.turn:
            raise _too_late()
        while http.their_state is SEND_BODY:
            event = http.next_event()
            if type(event) is Data:
                self.received += len(event.data)
                return event.data
            if event is not NEED_DATA:
                self.trailers = event.trailers
                return b""
            if http.expects_continue:
                await self._write(http.send(_CONTINUE))
            data = await self._read_body()
            http.receive_data(data) if data else http.receive_end()
        return b""

    async def _read_body(self):
        self.phase, data = _BODY, None
        try:
            with flowcoro.CancelScope() as self.part:
                data = await self.sock.read(CHUNK)
        finally:
            self.phase, self.part = _HANDLING, None
        fault, self.fault = self.fault, None
        if data is None:
            self.http.keep_alive = False
            raise fault
        return data

    async def inform(self, event):
        await self._write(self.http.send(event))

    async def upgrade(self, request, protocol, headers):
        http = self.http
        if protocol is None:
            if request.method != "CONNECT":
                raise HttpError(400, "this is for CONNECT only")
            event = ResponseHead(200, Headers(headers))
        elif protocol.lower() not in map(str.lower, http.upgrade):
            raise HttpError(426, f"this speaks {protocol} only", [("Upgrade", protocol), ("Connection", "Upgrade")])
        else:
            event = InformationalResponse(101, [("Upgrade", protocol), ("Connection", "Upgrade"), *Headers(headers)])
        if http.their_state is SEND_BODY:
            raise HttpError(400, "what asks for another protocol has no content here")
        await self._write(http.send(event))
        if rest := http.trailing_data:
            self.sock.unread(rest)
        self.phase = _SWITCHED_TO
        return self.sock

    async def _write(self, data):
        before, self.phase = self.phase, _SENDING
        try:
            await self.sock.write(data)
        except BaseException:               # nobody knows how much of it has been sent
            self._cut()
            raise
        self.phase = before

    def _cut(self):
        """H4: by a reset, so that it is no end to whoever waits for one."""
        try:
            self.sock.raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        except OSError:                     # closed already, or no socket of the system's
            pass
        self.sock.close_nowait()


class _Answering(_Exchange):
    """How an answer is sent that is more than a few bytes, or none."""

    __slots__ = ()

    @staticmethod
    def _head_of(response):
        pairs = response.headers.items()
        if "date" not in response.headers:
            pairs.append(_CLOCK.now().date)
        return ResponseHead(response.status, tuple(pairs), response.reason)

    async def _after_error(self, request, error):
        """What answers an error: a Response, and its head."""
        response = await self.app._respond_to_error(request, error)
        try:
            return response, self._head_of(response)
        except Exception as another:        # an error handler's, and a strange one
            flowcoro.report_error(another, f"the answer to the error of {request!r} is none", "flowcoro_http")
            response = Response(500, "Internal Server Error")
            return response, self._head_of(response)

    async def _instead(self, request, error):
        """The bytes of another answer if the handler's is none: a header that cannot be, content where there is none."""
        response, head = await self._after_error(request, error)
        try:
            return self.http.send_message(head, response.content)
        except Exception as another:
            flowcoro.report_error(another, f"the answer to the error of {request!r} is none", "flowcoro_http")
            await _close_stream(response.stream)
            response = Response(500, "Internal Server Error")
            return self.http.send_message(self._head_of(response), response.content)

    async def _stream(self, request, response, head):
        """Send an answer that is a stream; whether it is complete. If not, the connection is cut."""
        stream, http = response.stream, self.http
        try:
            if request.method == "HEAD" or response.status in _STATELESS:
                if response.status not in _STATELESS and type(stream) is not _FileStream and not response.endless:
                    self._say_type(response, head, await self._try(stream))
                await self._write(http.send(head) + http.send(EndOfMessage()))
            elif type(stream) is _FileStream:
                await self._send_file(stream, head)
            elif response.endless:
                await self._send_events(request, response, head)
            else:
                await self._send_pieces(request, response, head)
            return True
        except Exception as error:
            if http.our_state is SEND_RESPONSE:                 # nothing of it has been sent
                await self._write(await self._instead(request, error))
                return True
            self._cut()
            if not self._is_the_peers(error):
                flowcoro.report_error(error, f"the answer to {request!r} broke off; its connection is cut", "flowcoro_http")
            return False
        except BaseException:
            self._cut()
            raise
        finally:
            if type(response) is Response:
                response.stream = _SPENT
            await _close_stream(stream)

    def _is_the_peers(self, error):
        """Whether the client is why an answer broke off: nothing to report, or anybody could fill a log."""
        one = _only_of(error)
        return (isinstance(one, ProtocolError) or isinstance(one, HttpError) and one.status in (408, 413)
                or self.sock.caused(error))

    @staticmethod
    async def _try(stream):
        """Have a stream that nobody gets fail as it would for GET: an error before the first piece is the answer. -> the piece"""
        pieces = aiter(stream)
        try:
            piece = await anext(pieces, b"")
            _piece(piece)
            return piece
        finally:
            await _close_stream(pieces)

    @staticmethod
    def _say_type(response, head, piece):
        """Have the head of a stream say what its first piece is, if nobody else has said it."""
        if response._guessed and isinstance(piece, str):
            head.headers = tuple(_PLAIN_TYPE if pair == _BINARY_TYPE else pair for pair in head.headers)

    async def _send_pieces(self, request, response, head):
        http, pieces = self.http, aiter(response.stream)
        try:
            piece = await anext(pieces, b"")                    # before the head: an error can still be answered
            data = _piece(piece)
            self._say_type(response, head, piece)
            await self._write(http.send(head) + http.send(Data(data)))
            async for piece in pieces:
                if data := http.send(Data(_piece(piece))):
                    await self._write(data)
            await self._end(request, response)
        finally:
            await _close_stream(pieces)

    async def _send_events(self, request, response, head):
        """Send what has no end of its own: it is at one when the server closes."""
        http, pieces = self.http, aiter(response.stream)
        await self._write(http.send(head))
        try:
            piece = b""
            while piece is not None:
                if data := http.send(Data(_piece(piece))):
                    await self._write(data)
                piece = None
                try:
                    with flowcoro.CancelScope() as self.events:         # only round this: a write would be cut short
                        if not self.run.closing.is_set():
                            piece = await anext(pieces, None)
                finally:
                    self.events = None
            await self._end(request, response)
        finally:
            await _close_stream(pieces)

    async def _end(self, request, response):
        """Send the end of a stream, with its trailers where they have a place, and somebody who takes them (RFC 9110 6.5.1)."""
        trailers = response.trailers
        if self.http._out_mode is not _BY_CHUNKS or trailers and "trailers" not in _option_set(request.headers._combined("te")):
            trailers = None
        await self._write(self.http.send(EndOfMessage(trailers)))

    async def _send_file(self, stream, head):
        http, count = self.http, stream.count
        announced = [value for name, value in head.headers if name.lower() == "content-length"]
        if not announced:
            head.headers = (*head.headers, ("Content-Length", str(count)))
        elif announced != [str(count)]:
            raise LocalProtocolError(f"Content-Length: {announced[0]}, and {count} bytes of the file are to be sent")
        data = http.send(head)                          # before the phase is another: its error can still be answered
        self.phase = _SENDING
        stream.sent = await self.sock.send_file(stream.file, stream.offset, count, head=data)
        if stream.sent != count:
            raise OSError(f"{stream.file!r} has become shorter while it was sent: {count - stream.sent} bytes are missing")
        http._out_left -= count                         # the content went by another way
        http.send(EndOfMessage())


class _Spent:
    """What a Response has instead of the stream that was sent: again it would be an empty answer that looks like a good one."""

    __slots__ = ()

    def __aiter__(self):
        raise RuntimeError("the stream of this Response has been sent, and can be once: make a Response for each request")


_SPENT = _Spent()


def _piece(piece):
    """A piece of a stream, bytes."""
    if isinstance(piece, str):
        return piece.encode()
    if not isinstance(piece, (bytes, bytearray, memoryview)):
        raise TypeError(f"a stream has given {piece!r:.80}, and consists of bytes or str")
    return piece


async def _close_stream(stream):
    """Close what the pieces of an answer came from."""
    if hasattr(stream, "aclose"):
        try:
            await stream.aclose()
        except Exception as error:
            flowcoro.report_error(error, f"{stream!r} failed while it was closed; its answer has been sent", "flowcoro_http")


class _Connection(_Answering):
    """A connection of a server: reads requests, has them answered, writes the answers."""

    __slots__ = ()

    async def serve(self):
        """Until it ends. Cancelled: it is closed."""
        try:
            with contextlib.suppress(flowcoro_net.BrokenError, flowcoro.ClosedError):       # the client has gone; it was cut
                with flowcoro.CancelScope() as self.scope:
                    await self._serve()
                if self.speaker is not None:
                    return await self._speak()
                if self.fault is not None and self.http.our_state is IDLE:      # a head that has taken too long
                    with flowcoro.move_on_after(self.app.linger_timeout):
                        await self._refuse(self.fault)
        finally:
            if self.with_files is not None:
                self.with_files._close()

    def _speak(self):
        """To be awaited: the handler of a WebSocket. _serve() has returned, and HTTP is over: neither is on the way of a message,
        and what they held is given back, half a KiB in a coroutine and as much in a codec."""
        self.http, (handler, arguments) = _UPGRADED, self.speaker
        return _spoken(handler, self.websocket, arguments)

    async def _serve(self):
        app, sock, http, find, run, now = self.app, self.sock, self.http, self.app.find, self.run, _CLOCK.now
        while True:
            # An idle connection holds nothing of what it has received and sent.
            request = head = data = result = response = content = None
            if http._start == len(http._buffer):        # nothing of another request is here yet
                data = await sock.read(CHUNK)
                if known := http.receive_known(data, app.max_unread):       # (a larger one has to be read, or ends us)
                    request = self._known_request(*known)
                else:
                    http.receive_data(data) if data else http.receive_end()
            if request is None:
                try:
                    head = http.next_event()
                    while head is NEED_DATA:
                        self.phase = _HEAD
                        data = await sock.read(CHUNK)
                        http.receive_data(data) if data else http.receive_end()
                        head = http.next_event()
                except ProtocolError as error:
                    return await self._refuse(error)
                if type(head) is not RequestHead:
                    return None
                request = self._request(head)
            self.phase, known, data = _HANDLING, None, None     # (a handler may take hours)
            request._turn = self.turn = self.turn + 1
            try:
                if app._middleware or request.method == "CONNECT":
                    result = await app._respond(request)
                else:                                   # _respond() written out: two coroutines fewer, 0.3 µs
                    match = find(request.method, request.raw_path, request.host if app._hosts else None)
                    if match.status == 200:
                        request.params, request.route = match.params and match.params.copy(), match.route
                        result = await match.handler(request, **match.arguments)
                    else:
                        result = _answer_without(request, match)
                kind = type(result)
                if kind is str:
                    head, content = now().text, result.encode()
                elif kind is dict or kind is list:
                    head, content = now().json, flowcoro_schema.encode_json(result).encode()
                else:
                    response = _as_response(result)
                    head, content = self._head_of(response), response.content
            except Exception as error:
                response, head = await self._after_error(request, error)
                content = response.content
            if http.our_state is SWITCHED:
                return None
            if run.closing._set:
                http.keep_alive = False
            if content is None:
                if not await self._stream(request, response, head):
                    return None
            else:
                if http.their_state is SEND_BODY and http._left > app.max_unread:       # then _rest() will not read it
                    http.keep_alive = False
                try:
                    data = http.send_message(head, content)
                except Exception as error:
                    data = await self._instead(request, error)
                self.phase = _SENDING
                await sock.write(data)
            if request._files is not None:
                request._close()
            if not http.reusable and not await self._rest():
                return None
            if run.closing._set:                        # since the head was sent
                return await self._linger()
            http.start_next_cycle()
            self.phase = _IDLE
            self.turn += 1

    def _known_request(self, line, fields, content, _):
        request = _new(Request)
        request.headers = headers = _new(Headers)
        headers._entries, headers._index = fields.entries, fields.index
        request.method, request.target, request.raw_path, request.query_string = (
            line.method, line.target, line.raw_path, line.query_string)
        request.app, request._source, request._line, request._fields = self.app, self, line, fields
        if content:
            request._arrived = content
        return request

    def _request(self, head):
        """The Request of a head."""
        http = self.http
        if http._mode is _BY_LENGTH and not http._left:
            http.next_event()                           # EndOfMessage: it has no content
        else:
            self.received = 0
        request = _new(Request)
        request.method, request.target, request.headers, request.version = head.method, head.target, head.headers, head.version
        request.raw_path, _, request.query_string = head.target.partition("?")
        request.app, request._source = self.app, self
        if head.target[0] != "/":
            request.raw_path, _, request.query_string = head.path.partition("?")
            if head.target != "*" and head.method != "CONNECT":         # Host counts for nothing then: RFC 9112 section 3.2.2
                request.headers.set("Host", head.authority)
            if head.method == "CONNECT":                # what follows would be the tunnel's, and is no request
                http.keep_alive = False
        return request

    # -- how a cycle ends

    async def _rest(self):
        """After an answer: whether both sides can go on."""
        http = self.http
        if http.their_state is SEND_BODY and http.keep_alive and not http.expects_continue:
            try:                                        # a body that the handler did not want
                left = self.app.max_unread
                while left >= 0 and (data := await self.receive_body(self.turn)):
                    left -= len(data)
            except HttpError:
                pass
            self.trailers = None                # they are not the next one's
        if http.reusable:
            return True
        await self._linger()
        return False

    async def _refuse(self, error):
        """Answer what is no request, and close."""
        http = self.http
        self.app._refused += 1
        head = ResponseHead(error.status, (_PLAIN_TYPE, _CLOCK.now().date))
        await self._write(http.send_message(head, f"{error.message}\n".encode()))
        await self._linger()

    async def _linger(self):
        """H3."""
        if self.http._ended:
            return
        self.phase = _LINGERING
        with flowcoro.move_on_after(self.app.linger_timeout):
            await self.sock.shutdown_write()
            left = MAX_LINGER
            while left > 0 and (data := await self.sock.read(CHUNK)):
                left -= len(data)

    # -- the sweep's

    def look(self, passed):
        """`passed` seconds since the last look: end what has taken too long."""
        last, phase = self.seen, self.phase
        seen = self.seen = self.turn, phase
        app, sock = self.app, self.sock
        if last is None or last[0] != seen[0]:
            self.waited = self.lasted = 0.0
        elif phase is _BODY:
            self._look_at_body(passed)
            return
        elif self.lasted:                       # the limit of a body is for all of it, whatever is between
            self.lasted += passed
        if last != seen:
            self.since, self.progress = 0.0, 0
            return
        waited = self.since = self.since + passed
        if phase is _HANDLING:
            if self._has_ended():               # nobody will read the answer; or it waits for that, and ends its half:
                if self.progress:               # then it is to come before the next look
                    self.scope.cancel()
                self.progress = 1
        elif phase is _IDLE:
            self.http.forget_fields()
            if waited >= app.idle_timeout or self.run.closing.is_set():
                self.scope.cancel()
        elif phase is _HEAD:
            if waited >= app.head_timeout:
                self.fault = HttpError(408, f"the head of a request took more than {app.head_timeout:g} s")
                self.scope.cancel()
        elif phase is _SENDING:
            sent = sock.statistics()["bytes_sent"]
            if sent != self.progress:
                self.progress, self.since = sent, 0.0
            elif waited >= app.send_timeout:
                self.scope.cancel()

    def _has_ended(self):
        """Whether the client will send no more, or is gone."""
        if self.sock.hung_up or self.run.hears_ends:
            return self.sock.hung_up
        try:
            return not self.sock.raw.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _look_at_body(self, passed):
        app, part = self.app, self.part
        waited = self.waited = self.waited + passed
        self.lasted += passed
        if self.lasted >= app.body_timeout:
            fault = f"the content took more than {app.body_timeout:g} s"
        elif waited > BODY_GRACE and self.received < waited * app.min_body_rate:
            fault = f"the content came with less than {app.min_body_rate:g} bytes a second"
        else:
            return
        if part is not None:                    # (with several workers it may be there by now)
            self.fault = HttpError(408, fault)
            part.cancel()

    def close(self):
        """The server closes: what waits for a request, or for ever, ends."""
        events = self.events
        if self.websocket is not None:
            self.websocket.close_nowait(1001)
        elif events is not None:
            events.cancel()
        elif self.phase is _IDLE and self.turn:         # the first one may be on its way: that is the sweep's
            self.scope.cancel()


def _is_an_end(error):
    """Whether it ends more than a request: a task, or the program."""
    ends = flowcoro.Cancelled, GeneratorExit, KeyboardInterrupt, SystemExit
    return isinstance(error, ends) or isinstance(error, BaseExceptionGroup) and error.subgroup(ends) is not None


def _only_of(error):
    """What a group of one holds, also one in another; else the error itself."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


class _Run:
    """One serve(): its connections, and who looks after them."""

    def __init__(self, app):
        self.app, self.connections, self.closing = app, {}, flowcoro.Event()
        self.hears_ends = flowcoro.runtime_info()["selector"] == "EdgePoller"       # without a task that reads

    @contextlib.asynccontextmanager
    async def running(self):
        async with self.app._started(), flowcoro.TaskGroup() as group:
            group.spawn(self.sweep(), name="sweep of deadlines")
            group.spawn(self.close_on_stop(), name="close connections on a stop")
            try:
                yield
            finally:
                group.cancel()

    async def serve(self, sock, scheme=None):
        connection = self.connections[sock] = _Connection(self, sock)
        if scheme is not None:              # of the URL, where TLS is left out
            connection.scheme = scheme
        try:
            await connection.serve()
        except BaseException as error:
            if isinstance(error, Exception) or _is_an_end(error):
                raise
            connection._cut()               # asyncio.CancelledError, say: no end of ours, and none for the other connections
            flowcoro.report_error(error, f"a handler failed; its connection, {sock!r}, is cut", "flowcoro_http")
        finally:
            del self.connections[sock]
            connection.websocket = connection.speaker = None        # it knows its request, which knows this

    async def sweep(self):
        last = flowcoro.now()
        while True:
            await flowcoro.sleep(SWEEP)
            now = flowcoro.now()
            for count, connection in enumerate(list(self.connections.values()), 1):
                try:
                    connection.look(now - last)
                except Exception as error:          # of one connection, and the sweep is for all
                    flowcoro.report_error(error, f"{connection.sock!r} could not be looked after", "flowcoro_http")
                if not count % SWEPT_A_TURN:
                    await flowcoro.checkpoint()
            last = now

    async def close_on_stop(self):
        await flowcoro.stop_requested()
        self.close()

    def close(self):
        """No further requests: what is under way is answered."""
        self.closing.set()
        for connection in list(self.connections.values()):
            if connection.scope is not None:
                connection.close()


def _answer_without(request, match):
    """The answer when no handler is to be asked. HttpError for what is an error."""
    if match.status == 204:
        return Response(204, None, [("Allow", match.allow)])
    if match.status == 308:
        return Response.redirect(match.location + ("?" + request.query_string if request.query_string else ""), 308)
    if match.status == 405:
        raise HttpError(405, f"{request.raw_path} takes {match.allow}, and not {request.method}", [("Allow", match.allow)])
    raise HttpError(match.status, "the path is malformed" if match.status == 400 else f"there is no {request.raw_path}")


def _error_response(error):
    """The Response to an error that no handler was there for."""
    if isinstance(error, UnprocessableContent):
        return Response(error.status, error.document, error.headers, media_type="application/problem+json")
    if isinstance(error, HttpError):
        return Response(error.status, error.message or REASONS.get(error.status, ""), error.headers)
    return Response(500, "Internal Server Error")


def _kept_fields(error):
    """The header fields of an HttpError that another content has too: all but its media type."""
    return [pair for pair in Headers(error.headers) if pair[0].lower() != "content-type"]


def _seconds(name, value):
    """A limit of time that was given for `name`; math.inf for None."""
    if value is not None and not (isinstance(value, (int, float)) and value > 0):
        raise ValueError(f"{name}={value!r}: give seconds, more than 0, or None for no limit")
    return math.inf if value is None else value


class HttpServer(Router):
    """A web application: routes, middleware, and the server of them.

        app = HttpServer()

        @app.route("/users/{id:int}", methods=["GET"])
        async def user(request, id):
            return {"id": id}

        app.run("127.0.0.1", 8000)

    Routes are a Router's, which it is. A handler returns str (text/plain), bytes, dict or list (JSON), a Response, an async
    iterator (streamed), (status, content), (status, content, headers), or None (204). HttpError raised in it is its answer, also
    out of a TaskGroup; what else it raises is reported to sys.unraisablehook, and answered with 500.

    Limits, in seconds (None: no limit): head_timeout, for the handshake of TLS, and from the first byte of a head; body_timeout,
    for all of a body; idle_timeout, between requests; send_timeout, for a client that takes nothing of an answer; linger_timeout,
    for what still comes to a connection that the server ends. They are looked at twice a second. min_body_rate, bytes a second,
    on average after 5 s. In bytes: max_body (413; None: no limit but that of body() and form()), max_request_line (414),
    max_field_line, max_head, and max_fields, lines (431), max_chunk_line (400); max_unread, of a body that no handler has read: a
    larger one ends the connection. max_cookies (431), max_query_fields (413): when they are asked for. websocket: what speaks
    WebSocket, flowcoro_websocket.accept, for websocket(). The rest is Router's.
    """

    def __init__(self, *, head_timeout=HEAD_TIMEOUT, body_timeout=BODY_TIMEOUT, idle_timeout=IDLE_TIMEOUT,
                 send_timeout=SEND_TIMEOUT, min_body_rate=MIN_BODY_RATE, max_body=None, max_request_line=MAX_REQUEST_LINE,
                 max_field_line=MAX_FIELD_LINE, max_fields=MAX_FIELDS, max_head=MAX_HEAD, max_chunk_line=MAX_CHUNK_LINE,
                 max_unread=MAX_UNREAD, max_cookies=MAX_COOKIES, max_query_fields=MAX_FORM_FIELDS, linger_timeout=LINGER_TIMEOUT,
                 prefix="", redirect_slashes=False, json_depth=flowcoro_schema.JSON_DEPTH, max_errors=flowcoro_schema.ERRORS,
                 websocket=None):
        super().__init__(prefix, redirect_slashes, json_depth=json_depth, max_errors=max_errors)
        self._accept_websocket = _checked_speaker(websocket)
        self.head_timeout, self.body_timeout = _seconds("head_timeout", head_timeout), _seconds("body_timeout", body_timeout)
        self.idle_timeout, self.send_timeout = _seconds("idle_timeout", idle_timeout), _seconds("send_timeout", send_timeout)
        self.linger_timeout = _seconds("linger_timeout", linger_timeout)
        self.max_unread, self.max_cookies, self.max_query_fields = max_unread, max_cookies, max_query_fields
        self.min_body_rate = 0 if min_body_rate is None else min_body_rate
        if not isinstance(self.min_body_rate, (int, float)) or not self.min_body_rate >= 0:
            raise ValueError(f"min_body_rate={min_body_rate!r}: give bytes a second, 0 or more, or None for no limit")
        self.state = types.SimpleNamespace()
        self._codec_limits = {"max_body": max_body, "max_request_line": max_request_line, "max_field_line": max_field_line,
                              "max_fields": max_fields, "max_head": max_head, "max_chunk_line": max_chunk_line}
        for name, limit in [*self._codec_limits.items(), ("max_unread", max_unread), ("max_cookies", max_cookies),
                            ("max_query_fields", max_query_fields)]:
            if (limit is not None or name != "max_body") and (type(limit) is not int or limit < 0):
                raise ValueError(f"{name}={limit!r}: give a number, an int of 0 or more{', or None' * (name == 'max_body')}")
        self._middleware, self._chain = [], None
        self._error_handlers = {}       # status or exception class -> handler
        self._lifespans = []            # functions that give async context managers
        self._runs, self._stack = 0, None
        self._starting = flowcoro.Lock()        # held while the first run starts, and while the last one ends
        self._refused = 0

    # -- what goes around the handlers

    def middleware(self, function, *, outermost=False):
        """Have `async def function(request, call_next)` stand between the server and the handlers; may be used as a decorator.

        It returns what `await call_next(request)` gives, a Response, or another one, or what handlers may return, but not None.
        The first that is added is the outermost, unless a later one says outermost=True. Errors of handlers are answers already
        when they come to it; what it raises itself becomes one.
        """
        if not callable(function):
            raise TypeError(f"middleware({function!r}): give an async function of request and call_next")
        self._middleware.insert(0 if outermost else len(self._middleware), function)
        self._chain = None
        return function

    def error_handler(self, kind):
        """A decorator: `async def handler(request, error)` answers this status, or this class of exceptions and its subclasses.

        It returns what handlers may return; a content alone keeps the status of an HttpError, and its headers but Content-Type,
        such as Allow of a 405; else it is a 500. The class that is nearest to the exception's counts, before that a status. An
        HttpError that it raises is the answer. That for 500 is asked, after the error has been reported, about all that no class
        is there for. What is no request (400, 408, 414, 431) is answered without. Of an exception group that holds one error
        alone that error counts, unless a class of groups is given here.
        """
        if not (isinstance(kind, int) and 400 <= kind <= 599 or isinstance(kind, type) and issubclass(kind, Exception)):
            raise TypeError(f"error_handler({kind!r}): give a status from 400 to 599, or a class of exceptions")

        def decorate(handler):
            self._error_handlers[kind] = handler
            return handler
        return decorate

    def lifespan(self, function, *, outermost=False):
        """Have the async context manager that `function()` gives entered before the first request, and left after the last; a
        decorator: an `async def` with one `yield` does too. In each process that serves. Its errors end the serving. The first
        that is added is the outermost, unless a later one says outermost=True.
        """
        if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
            raise TypeError(f"lifespan({function!r:.80}): give an `async def` with one `yield`, or a function that gives an "
                            "async context manager")
        around = contextlib.asynccontextmanager(function) if inspect.isasyncgenfunction(function) else function
        self._lifespans.insert(0 if outermost else len(self._lifespans), around)
        return function

    def on_startup(self, function):
        """Have `function()` (async or not) called before the first request; a decorator. Order as added, lifespans too."""
        @contextlib.asynccontextmanager
        async def started():
            await _called(function)
            yield
        self._lifespans.append(started)
        return function

    def on_shutdown(self, function):
        """Have `function()` (async or not) called after the last request; a decorator. The last added is called first."""
        @contextlib.asynccontextmanager
        async def stopped():
            try:
                yield
            finally:
                await _called(function)
        self._lifespans.append(stopped)
        return function

    @contextlib.asynccontextmanager
    async def _started(self):
        """What lifespans and hooks want, once for all servers of this application that run at the same time."""
        async with self._starting:
            if not self._runs:
                async with contextlib.AsyncExitStack() as stack:
                    for lifespan in self._lifespans:
                        await stack.enter_async_context(lifespan())
                    self._stack = stack.pop_all()
            self._runs += 1
        try:
            yield
        finally:
            with flowcoro.CancelScope(shield=True):
                async with self._starting:
                    self._runs -= 1
                    if not self._runs:
                        await self._shut_down()

    async def _shut_down(self):
        """What was started, ended: also when the server is cancelled, so within a limit."""
        stack, self._stack = self._stack, None
        with flowcoro.move_on_after(SHUTDOWN_TIMEOUT) as scope:
            await stack.aclose()
        if scope.cancelled_caught:
            raise TimeoutError(f"what on_shutdown() and lifespan() have added took more than {SHUTDOWN_TIMEOUT:g} s to end")

    # -- from a request to its answer

    async def _respond(self, request):
        """The Response to a request, through all middleware; never an Exception."""
        if self._chain is None:
            self._chain = self._handle
            for function in reversed(self._middleware):
                self._chain = self._linked(function, self._chain)
        return await self._chain(request)

    async def _handle(self, request):
        """What the innermost call_next() is."""
        try:
            if request.method == "CONNECT":
                raise HttpError(501, "this server makes no tunnels")
            match = self.find(request.method, request.raw_path, request.host if self._hosts else None)
            if match.status != 200:
                return _answer_without(request, match)
            request.params, request.route = match.params and match.params.copy(), match.route
            return _as_response(await match.handler(request, **match.arguments))
        except Exception as error:
            return await self._respond_to_error(request, error)

    async def _respond_to_error(self, request, error):
        """The Response that an error is answered with; never an Exception."""
        if isinstance(error, ExceptionGroup):
            error = self._of_group(error)
        source, of_http = request._source, isinstance(error, HttpError)
        gone = source is not None and (source.sock.caused(error) or _is_its_end(error, source.websocket))
        if source is not None and source.upgraded:
            if not gone:
                flowcoro.report_error(error, f"{request!r} was upgraded, and its handler failed; its connection is closed",
                                      "flowcoro_http")
            return Response(500)
        handler = self._error_handler_of(error) if not gone else None
        if handler is None and not of_http and not gone:
            flowcoro.report_error(error, f"the handler of {request!r} failed; it is answered with 500", "flowcoro_http")
            handler = self._error_handlers.get(500)
        try:
            if handler is not None:
                try:
                    result = await handler(request, error)
                    if isinstance(result, (Response, tuple)):
                        return _as_response(result)
                    return Response(error.status, result, _kept_fields(error)) if of_http else Response(500, result)
                except HttpError as another:
                    error = another
            return _error_response(error)
        except Exception as another:
            flowcoro.report_error(another, f"what was to answer an error of {request!r} failed", "flowcoro_http")
            return Response(500, "Internal Server Error")

    def _of_group(self, group):
        """The error that is answered: the only one of a group, if an answer to it is known and none to groups."""
        handlers, error = self._error_handlers, _only_of(group)
        for_groups = any(issubclass(kind, ExceptionGroup) for kind in type(group).__mro__ if kind in handlers)
        return group if for_groups or not isinstance(error, HttpError) and self._error_handler_of(error) is None else error

    def _error_handler_of(self, error):
        """The handler for the status of an HttpError, or else of the class that is nearest to the exception's."""
        handlers = self._error_handlers
        handler = handlers.get(error.status) if isinstance(error, HttpError) else None
        if handler is None:
            handler = next((handlers[kind] for kind in type(error).__mro__ if kind in handlers), None)
        return handler

    def _linked(self, function, call_next):
        """A middleware and what comes after it, as one function that gives the Response to a request; never an Exception."""
        async def call(request):
            try:
                result = await function(request, call_next)
                if result is None and (request._source is None or not request._source.upgraded):
                    raise TypeError(f"the middleware {getattr(function, '__name__', function)!s:.80} returned None; it returns "
                                    "what call_next(request) gives, or another answer")
                return _as_response(result)
            except Exception as error:
                return await self._respond_to_error(request, error)
        return call

    def describe(self, path="/openapi.json", page="/docs", **options):
        """Serve the OpenAPI document of all routes at `path`, and a page for people at `page` (None: no page).

        `options` as openapi(): title, version, description, servers. Both are made anew when they are asked for.
        """
        async def document(request):
            return openapi(self, **options)

        async def for_people(request):
            return Response(200, openapi_page(openapi(self, **options), url=path), [("Content-Security-Policy", _CSP_OF_PAGES)],
                            media_type="text/html; charset=utf-8")

        self.add(path, document, documented=False)
        if page is not None:
            self.add(page, for_people, documented=False)

    def websocket(self, path, *, name=None, host=None, **options):
        """As Router's. RuntimeError without HttpServer(websocket=), TypeError for an option that its accept() does not have."""
        _check_options(self._accept_websocket, path, options)
        return super().websocket(path, name=name, host=host, **options)

    # -- serving

    async def listen(self, host="127.0.0.1", port=8000, *, unix=None, mode=None, tls=None, backlog=None, reuse_port=False):
        """Listen on an address, or on a Unix socket (`unix`: its path, `mode` its permissions). -> HttpListener

        tls: an ssl.SSLContext, as flowcoro_net.server_tls() makes it, or the path of a PEM file with certificates and key, or
        (certificates, key), two of them, which SIGHUP reads anew. The rest, and errors, as TcpServer.listen() and
        UnixServer.listen().
        """
        files = None
        if isinstance(tls, (tuple, str, bytes, os.PathLike)):
            files = tls if isinstance(tls, tuple) else (tls,)
            tls = flowcoro_net.server_tls(*files, alpn=["http/1.1"])
        options = {} if backlog is None else {"backlog": backlog}
        if unix is not None:
            server = await flowcoro_net.UnixServer.listen(unix, tls=tls, mode=mode, **options)
        else:
            server = await flowcoro_net.TcpServer.listen(host, port, tls=tls, reuse_port=reuse_port, **options)
        return HttpListener(self, server, tls, files)

    def run(self, host="127.0.0.1", port=8000, *, processes=None, drain_timeout=DRAIN_TIMEOUT, max_connections=math.inf,
            workers=None, **options):
        """Serve until Ctrl-C or SIGTERM: listen() and serve(), and what they take. A second Ctrl-C ends at once."""
        ours = (threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
                and signal.getsignal(signal.SIGINT) == signal.default_int_handler)

        async def main():
            async with await self.listen(host, port, **options) as server:
                print(f"serving on {server.url}  (Ctrl-C ends it)", file=sys.stderr, flush=True)
                with _asking_once() if ours else contextlib.nullcontext():
                    await server.serve(processes=processes, drain_timeout=drain_timeout,
                                       max_connections=max_connections)
        try:
            flowcoro.run(main(), workers=workers,
                         grace=drain_timeout + END_TIMEOUT if isinstance(drain_timeout, (int, float)) else math.inf)
        except KeyboardInterrupt:
            pass

    def static(self, prefix, directory, **options):
        """Serve the files of a folder below `prefix`: mount() of static_files(), whose options these are."""
        return self.mount(prefix, static_files(directory, **options))

    def test_client(self, **options):
        """An HttpClient of this app without a network, for tests: `async with app.test_client() as client:`.

        The app runs while the client is open, with startup and shutdown; connections are in memory, and URLs may begin with their
        path. options: HttpClient's. An https URL says so to the app's URLs, but there is no TLS. `await client.socket()` is a
        connection of its own: `connect("ws://testserver/…", socket=await client.socket())`, of flowcoro_websocket, is a
        WebSocket.
        """
        return _test_client(self, **options)

    def statistics(self):
        """{"running": servers of this application in this process, "refused": what came and was no request}"""
        return {"running": self._runs, "refused": self._refused}


_SILENT = "this server speaks no WebSocket: say what does: HttpServer(websocket=flowcoro_websocket.accept)"


def _checked_speaker(accept):
    if accept is not None and not callable(accept):
        raise TypeError(f"websocket={accept!r:.60}: give what speaks it, flowcoro_websocket.accept")
    return accept


def _check_options(accept, path, options):
    """Whether what speaks WebSocket takes them: before anybody asks for one."""
    if accept is None:
        raise RuntimeError(_SILENT)
    try:
        inspect.signature(accept).bind(None, **options)
    except TypeError as error:
        raise TypeError(f"websocket({path!r}): {error}") from None


def _websocket_handler(handler, options):
    """The handler of a route for what websocket() decorates."""
    if not inspect.iscoroutinefunction(handler):
        raise TypeError(f"{_shown_handler(handler)}: a handler of a WebSocket is `async def handler(ws)`")

    @functools.wraps(handler)
    async def serve(request, **arguments):
        accept = request.app._accept_websocket
        if accept is None:
            raise RuntimeError(_SILENT)
        ws = await _accepted(accept, request, options)
        if request._source is not None and not request.app._middleware:         # that may want to know how it ends
            request._source.speaker = handler, arguments
        else:
            await _spoken(handler, ws, arguments)
    return serve


async def _spoken(handler, ws, arguments):
    """Have a handler speak, and close its WebSocket."""
    try:
        async with ws:
            await handler(ws, **arguments)
    except Exception as error:
        if not _is_its_end(error, ws):
            flowcoro.report_error(error, f"{ws.request!r} was upgraded, and its handler failed; its WebSocket is closed",
                                  "flowcoro_http")


async def _accepted(accept, request, options):
    """The WebSocket, which is told when the server ends. HttpError."""
    try:
        ws = await accept(request, **options)
    except HttpError:
        raise
    except Exception as error:              # its HandshakeError, whose class is not known here
        if type(getattr(error, "status", None)) is not int:
            raise
        raise HttpError(error.status, str(error), error.headers) from error
    if request.websocket is not ws:
        request.websocket = ws
    return ws


def _is_its_end(error, ws):
    """Whether an error, or all of a group, says that this WebSocket (if it is one) was closed. (Not by its code: who sends may be
    told that the connection is lost before the Close that came with the end is read.)"""
    if ws is None:
        return False
    if isinstance(error, BaseExceptionGroup):
        return all(_is_its_end(each, ws) for each in error.exceptions)
    return isinstance(error, flowcoro_net.BrokenError) and getattr(error, "websocket", None) is ws


@contextlib.contextmanager
def _asking_once():
    """Ctrl-C asks for a stop, as SIGTERM does; the next one is the kernel's, and cancels."""
    kernels = signal.getsignal(signal.SIGINT)

    def ask(number, frame):
        signal.signal(signal.SIGINT, kernels)
        signal.raise_signal(signal.SIGTERM)

    signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is ask:
            signal.signal(signal.SIGINT, kernels)


async def _called(function):
    result = function()
    if inspect.isawaitable(result):
        await result


class HttpListener:
    """An application on an address: `await app.listen(…)`; then serve(). Best in `async with`, which closes it."""

    def __init__(self, app, server, tls, files=None):
        self._app, self._server, self._tls, self._files, self._run = app, server, tls, files, None

    async def serve(self, *, processes=None, drain_timeout=DRAIN_TIMEOUT, max_connections=math.inf, reload=None):
        """Serve until close() or a stop (SIGTERM, flowcoro.request_stop()). Then no connection is accepted any more, those that
        wait for a request are closed, endless streams end, and what is under way has `drain_timeout` seconds before it is
        cancelled.

        processes: worker processes that share the address, and have the application's lifespans each; reload and all else as
        TcpServer.serve(), but what `reload` returns, if not None, is the HttpServer of the new processes. SIGHUP, or reload(),
        has the files of tls= read anew, before that; SIGHUP without processes, too, in the main thread and if nobody else handles
        it. Errors of lifespans are serve()'s, those of a start at once; in a worker process they end that process, which is
        replaced after a while, longer each time. Cancelled: all ends at once.
        """
        options = {"lifespan": self._running, "drain_timeout": drain_timeout, "max_connections": max_connections,
                   "handshake_timeout": self._app.head_timeout}
        if processes is not None:
            options |= {"processes": processes, "reload": functools.partial(self._reload, reload)}
        elif reload is not None:
            raise ValueError("reload= needs processes=: it is called before worker processes are replaced")
        await self._server.serve(self._serve_one, **options)

    async def _reload(self, function):
        if self._files is not None:
            self.reload_certificate()
        app = function and function()
        app = await app if inspect.isawaitable(app) else app
        if app is not None:
            if not isinstance(app, HttpServer):
                raise TypeError(f"reload= returned {app!r:.80}: give an HttpServer, or None for the same as before")
            self._app = app

    @contextlib.asynccontextmanager
    async def _running(self):
        self._run = _Run(self._app)
        try:
            async with self._run.running():
                with self._hearing_hangups():
                    yield
        finally:
            self._run = None

    @contextlib.contextmanager
    def _hearing_hangups(self):
        """SIGHUP reads certificates anew. (With processes that is the supervisor's, and here it is ignored.)"""
        def reload(number, frame):              # at any bytecode; it touches nothing that is the kernel's
            try:
                self.reload_certificate()
            except (OSError, ValueError) as error:
                flowcoro.report_error(error, f"{self!r} goes on with the certificate that it had", "flowcoro_http")

        heard = (self._files is not None and threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGHUP")
                 and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL)
        if heard:
            signal.signal(signal.SIGHUP, reload)
        try:
            yield
        finally:
            if heard and signal.getsignal(signal.SIGHUP) is reload:
                signal.signal(signal.SIGHUP, signal.SIG_DFL)

    def _serve_one(self, sock):
        return self._run.serve(sock)

    def close(self):
        """Accept no more, and end as serve() says. Twice is once. Never blocks."""
        self._server.close()
        if self._run is not None:
            self._run.close()

    async def __aenter__(self):
        return self

    async def __aexit__(self, kind, error, trace):
        self.close()

    def reload_certificate(self, certificate=None, key=None, password=None):
        """Have connections from now on use this certificate (PEM files; None: those of tls=, read anew).

        OSError, ssl.SSLError: then nothing has changed. RuntimeError: there is no TLS, or no such file. It reads files: a
        millisecond.
        """
        if self._tls is None:
            raise RuntimeError("this server has no TLS: pass tls= to listen()")
        if certificate is None:
            if self._files is None:
                raise RuntimeError("tls= was no file that could be read anew: pass a certificate")
            certificate, key = (*self._files, None)[:2]
        flowcoro_net.server_tls(certificate, key, password=password)            # whether they fit, before any is exchanged
        self._tls.load_cert_chain(certificate, key, password)

    @property
    def addresses(self):
        """Where it listens: a list of addresses."""
        return self._server.addresses

    @property
    def local(self):
        """Where it listens: (host, port) of the first address, or the path of a Unix socket."""
        return self._server.local

    @property
    def url(self):
        """The URL of its first address; of a Unix socket its path."""
        if not isinstance(self.local, tuple):
            return str(self.local)
        host, port = self.local
        return f"http{'s' * (self._tls is not None)}://{f'[{host}]' if ':' in host else host}:{port}"

    def reload(self):
        """Replace the worker processes of serve(processes=), one by one. RuntimeError if there are none."""
        self._server.reload()

    def statistics(self):
        """What TcpServer.statistics() has, and the application's."""
        return self._server.statistics() | self._app.statistics()

    def __repr__(self):
        return f"<HttpListener {self.url}>"


# ---- files ----------------------------------------------------------------------------------------------------
# A file that is small is kept in memory with its header fields, made once. Before each use one stat(2) asks whether the path
# still leads to the same bytes: device, inode, size, and both times in nanoseconds. Whoever puts a link or another file there
# changes at least the inode, so what has been found without following links need not be walked to again.
#
#     D1  what is sent is of one descriptor: its size, tag and date are that descriptor's, whatever the path leads to by now
#     D2  below a folder that is served each step is opened relative to the one before, and none of them through a link:
#         there is no moment between a check and a use in which a link could be put there
#     D3  only what is a regular file is opened, and without waiting; a pipe or device put there in between is closed unread
#     D4  what has been changed less than RECENT seconds ago is not kept: it could change again within one tick of the clock
#         that the file system has, and look the same
#
# What is in memory is looked at by the worker itself: a stat of a path that was asked for lately takes 1.7 µs, a trip through a
# thread 30 to 50, which is more than all of such an answer (24 µs). Everything else (the first look, a folder, what is not there)
# is done in a thread, since a disk or a network may have to be waited for. A large file that is known is opened by the worker
# too: 20 µs, of a path that has just been looked at.

# Bytes of a file up to which it is kept in memory, and of all of them in one cache; files in it, the large ones included, of
# which only the header is kept. 64 KiB is what a socket takes at once; beyond it sendfile(2) is quicker.
CACHED_FILE, FILE_CACHE, CACHED_FILES = 64 * 2**10, 16 * 2**20, 4096

# Seconds for which a file is known before it is looked for anew: that is how late a precompressed sibling is noticed.
FILE_SECONDS = 10.0

# Seconds for which a file that was changed is not taken for settled: FAT's clock ticks every 2 s, ext4's every 10 ms at most.
RECENT = 2.0

# Names that a listing shows at most.
LISTED = 10_000

# Codings of siblings, in the order of preference, and the endings of their names.
_SIBLINGS = (("br", ".br"), ("gzip", ".gz"))

# What makes a request for a file more than "all of it".
_CONDITIONS = frozenset(["range", "if-none-match", "if-modified-since", "if-match", "if-unmodified-since", "if-range"])

# What the system says of a path that leads to nothing that could be served: not there, through what is no folder or is a link
# (FreeBSD says EMLINK), too long, a socket, or a device that is none.
_NOT_THERE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EMLINK, errno.ENAMETOOLONG, errno.ENXIO, errno.ENODEV,
              errno.EINVAL, errno.EISDIR, errno.EOPNOTSUPP}

_OPEN_FILE = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY"))
_OPEN_FOLDER = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_DIRECTORY", "O_NONBLOCK", "O_CLOEXEC"))
_CAN_WALK = {os.open, os.stat} <= os.supports_dir_fd and hasattr(os, "O_NOFOLLOW") and os.stat in os.supports_follow_symlinks

# What Python's table of types does not know, or not yet.
_NEWER_TYPES = (
        ("text/javascript", ".js"), ("text/javascript", ".mjs"), ("text/markdown", ".md"), ("text/yaml", ".yaml"),
        ("application/manifest+json", ".webmanifest"), ("application/json", ".map"), ("application/wasm", ".wasm"),
        ("application/x-ndjson", ".ndjson"), ("application/toml", ".toml"), ("font/woff2", ".woff2"), ("font/woff", ".woff"),
        ("font/ttf", ".ttf"), ("font/otf", ".otf"), ("image/webp", ".webp"), ("image/avif", ".avif"), ("image/x-icon", ".ico"),
        ("audio/flac", ".flac"), ("audio/ogg", ".ogg"), ("video/webm", ".webm"), ("application/rtf", ".rtf"))

# What is compressed as a whole is sent as that: with Content-Encoding a browser would save it inflated, under the same name.
_PACKED = {"gzip": "application/gzip", "bzip2": "application/x-bzip2", "xz": "application/x-xz",
           "compress": "application/x-compress", "br": "application/octet-stream"}


@functools.cache
def _types():
    """Python's own table, not the system's, so that a file has the same type everywhere. Made late: it reads the system's too."""
    types = mimetypes.MimeTypes()
    for kind, ending in _NEWER_TYPES:
        types.add_type(kind, ending)
    return types


def _file_type(name):
    """The Content-Type value for a file of this name; text is taken for UTF-8."""
    kind, packed = _types().guess_type("./" + name)         # "./": else "data:…" would be taken for a URL that says it itself
    kind = _PACKED.get(packed, "application/octet-stream") if packed else kind or "application/octet-stream"
    return f"{kind}; charset=utf-8" if kind.startswith("text/") else kind


def _same(state):
    """What is equal as long as a file is the same, of an os.stat_result."""
    return state.st_mtime_ns, state.st_ctime_ns, state.st_size, state.st_ino, state.st_dev


class _Found:
    """A file as it is sent: its header fields, made once, and its content if it is small, else None."""

    __slots__ = ("path", "names", "same", "size", "etag", "modified", "fields", "content", "media_type", "coding", "max_age",
                 "siblings", "until", "settled")

    def __init__(self, number, path, *, media_type, max_age=None, names=(), coding=None, siblings=None):
        """Read it from the descriptor `number`. `names`: the way to it from the folder that is served; `siblings`: {coding:
        _Found} of the same file, compressed.
        """
        state, now = os.fstat(number), time.time()
        self.path, self.names, self.same, self.size, self.content = path, names, _same(state), state.st_size, None
        self.media_type, self.coding, self.max_age, self.siblings = media_type, coding, max_age, siblings
        self.settled = now - max(state.st_mtime, state.st_ctime) > RECENT
        self.modified = max(0, min(math.floor(state.st_mtime), math.floor(now)))      # never later than Date: RFC 9110 8.8.2.1
        if self.size <= CACHED_FILE:
            self.content = _read_descriptor(number, 0, self.size)
            self.size = len(self.content)                   # it may have been cut just now
            self.etag = _content_tag(self.content)
        else:
            self.etag = entity_tag(f"{state.st_mtime_ns:x}-{self.size:x}", weak=not self.settled)
        fields = [("Content-Type", media_type), ("ETag", self.etag), ("Last-Modified", http_date(self.modified)),
                  ("Accept-Ranges", "bytes"), ("X-Content-Type-Options", "nosniff")]
        if coding:
            fields.append(("Content-Encoding", coding))
        if coding or siblings:
            fields.append(("Vary", "Accept-Encoding"))
        if max_age is not None:
            fields.append(("Cache-Control", cache_control(public=True, max_age=max_age)))
        headers = Headers(fields)                           # checked, and for each answer copied with its index
        self.fields = headers._entries, _first_of_each(headers._entries)

    def holds(self):
        """Whether the path still leads to the same file."""
        try:
            return _same(os.stat(self.path)) == self.same
        except OSError:
            return False

    def again(self, number):
        """This one, if the descriptor is of the same file, or what is found there."""
        if _same(os.fstat(number)) == self.same:
            return self
        return _Found(number, self.path, media_type=self.media_type, max_age=self.max_age, names=self.names,
                      coding=self.coding, siblings=self.siblings)


def _read_descriptor(number, offset, count):
    """`count` bytes of a descriptor, less at its end."""
    pieces = []
    os.lseek(number, offset, os.SEEK_SET)
    while count > 0 and (piece := os.read(number, count)):
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)


class _FileCache:
    """{key: _Found}, bounded: CACHED_FILES, and `max_bytes` of content; the one that was put in first goes first."""

    def __init__(self, max_bytes):
        self._found, self._bytes, self._max_bytes = {}, 0, max_bytes

    def get(self, key):
        """What is known to be there still, or None."""
        found = self._found.get(key)
        return found if found is not None and flowcoro.now() < found.until and found.holds() else None

    @flowcoro.atomic
    def put(self, key, found):
        """Keep it, if it is settled and not too large by itself."""
        self._drop(key)
        weight = self._weight(found)
        if not found.settled or weight > self._max_bytes:
            return
        while self._found and (self._bytes + weight > self._max_bytes or len(self._found) >= CACHED_FILES):
            self._drop(next(iter(self._found)))
        found.until = flowcoro.now() + FILE_SECONDS
        self._found[key] = found
        self._bytes += weight

    def _drop(self, key):
        found = self._found.pop(key, None)
        if found is not None:
            self._bytes -= self._weight(found)

    def _weight(self, found):
        return sum(len(one.content or b"") for one in (found, *(found.siblings or {}).values()))


# What send_file() has sent lately.
_SENT_FILES = _FileCache(FILE_CACHE)


# -- the answer

_ALL_OF_IT = _Decision(200)


def _file_response(request, found, open_file, extra=()):
    """The Response that sends a _Found, or what of it is asked for. HttpError 412, 416, and OSError of open_file().

    open_file() gives a descriptor of a large file; `extra`: more header fields.
    """
    decision, file = _decide(request, found), None
    if found.content is None and request.method != "HEAD" and decision.status in (200, 206):
        number = open_file()
        try:
            again = found.again(number)
            if again is not found:                          # it has been changed since it was looked at
                found, decision = again, _decide(request, again)
            file = open(found.path, "rb", buffering=0, opener=lambda *_, number=number: number)     # errors name the path
            number = None
        finally:
            if number is not None:
                os.close(number)
        if found.content is not None or decision.status not in (200, 206):
            file.close()
    entries, index = found.fields
    headers = Headers._of(entries.copy(), index)
    for name, value in extra:
        headers.set(name, value)
    if decision.status == 200:
        if found.content is not None:
            return _response_of(200, headers, found.content)
        headers.add("Content-Length", str(found.size))
        if file is None:                                    # HEAD
            return _response_of(200, headers, b"")
        return _response_of(200, headers, None, _FileStream(file, 0, found.size))
    if decision.status == 206:
        return _partial(found, decision.ranges, headers, file)
    if decision.status == 304:
        for name in ("content-type", "content-encoding", "accept-ranges", "content-disposition"):
            headers.remove(name)
        return _response_of(304, headers, b"")
    if decision.status == 412:
        raise HttpError(412, "the file is not what If-Match or If-Unmodified-Since say")
    raise HttpError(416, f"the file has {found.size} bytes, and none of them were asked for",
                    [("Content-Range", f"bytes */{found.size}"), ("ETag", found.etag)])


def _response_of(status, headers, content, stream=None):
    """A Response whose headers are checked already: 0.3 µs instead of 1.6."""
    response = _new(Response)
    response.status, response.headers, response.content, response.stream = status, headers, content, stream
    return response


def _decide(request, found):
    headers = request.headers
    index = headers._index or _first_of_each(headers._entries)      # one look at the few names that there are, not six for others
    if request.method not in ("GET", "HEAD") or _CONDITIONS.isdisjoint(index):
        return _ALL_OF_IT
    return _evaluate(request.method, headers, now=time.time(), etag=found.etag, last_modified=found.modified, size=found.size)


def _partial(found, ranges, headers, file):
    """The 206 with these ranges, of `file` or of what is in memory."""
    content = found.content
    if len(ranges) == 1:
        first, last = ranges[0]
        headers.add("Content-Range", ranges[0].content_range(found.size))
        if content is not None:
            return _response_of(206, headers, content[first:last + 1])
        headers.add("Content-Length", str(ranges[0].length))
        return _response_of(206, headers, None, _FileStream(file, first, ranges[0].length))
    frame = _frame_byteranges(ranges, found.size, found.media_type, secrets.token_hex(16))
    headers.set("Content-Type", frame.content_type)
    if content is not None:
        parts = [piece for head, one in frame.parts for piece in (head, content[one.first:one.last + 1])]
        return _response_of(206, headers, b"".join([*parts, frame.tail]))
    headers.add("Content-Length", str(frame.length))
    return _response_of(206, headers, None, _FileParts(file, frame))


class _FileParts:
    """The content of a multipart/byteranges answer, of a file which it owns: aclose() closes it."""

    def __init__(self, file, frame):
        self._file, self._steps = file, self._plan(frame)

    @staticmethod
    def _plan(frame):
        """What is sent: bytes as they are, and (offset, count) of the file."""
        for head, one in frame.parts:
            yield head
            for at in range(one.first, one.last + 1, CHUNK):
                yield at, min(CHUNK, one.last + 1 - at)
        yield frame.tail

    def __aiter__(self):
        return self

    async def __anext__(self):
        step = next(self._steps, None)
        if step is None:
            raise StopAsyncIteration
        return step if isinstance(step, bytes) else await flowcoro.to_thread(_read_at, self._file, *step)

    async def aclose(self):
        self._file.close()

    def __del__(self):                  # as _FileStream's
        self._file.close()


def _of_the_system(error):
    """The answer that an OSError is: HttpError 404, 403, 503; or the error itself."""
    if error.errno in _NOT_THERE:
        return HttpError(404, "there is no such file")
    if error.errno in (errno.EACCES, errno.EPERM):
        return HttpError(403, "the server may not read this file")
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return HttpError(503, "too many files are open; try again", [("Retry-After", "1")])
    return error


async def send_file(request, path, *, filename=None, inline=False, media_type=None, max_age=None):
    """A Response that sends a file of yours, or of it what the request's conditions and ranges ask for.

    `path` is trusted, and links are followed: what a client has a say in goes through static_files(). filename: what it is to be
    saved as (Content-Disposition: attachment; with inline=True it is shown, and saved under that name on demand). media_type:
    guessed from the name if None. max_age: seconds for which caches may keep it.
    HttpError 404 for what is no regular file, 403, 412, 416. A client that asks for ranges gets them of one and the same file,
    also if it is replaced meanwhile; one that is cut short while it is sent breaks the connection off. RFC 9110 chapters 13, 14.
    """
    path = os.fsdecode(path)
    media_type = media_type or _file_type(os.path.basename(path))
    key = path, media_type, max_age
    extra = ()
    if filename is not None or inline:
        extra = [("Content-Disposition", content_disposition(filename, "inline" if inline else "attachment"))]
    try:
        found = _SENT_FILES.get(key)
        if found is None:
            found = await flowcoro.to_thread(_look_at, path, media_type, max_age)
            _SENT_FILES.put(key, found)
        return _file_response(request, found, lambda: _open_regular(path), extra)
    except OSError as error:
        raise _of_the_system(error) from error


def _look_at(path, media_type, max_age):
    number = _open_regular(path)
    try:
        return _Found(number, path, media_type=media_type, max_age=max_age)
    finally:
        os.close(number)


def _open_regular(path, **at):
    """A descriptor of a regular file. FileNotFoundError for anything else, before it is opened; other OSErrors.

    `at`: dir_fd=, the folder that the path is relative to; the path is one name then, and not followed if it is a link.
    """
    follow = not at
    if not stat.S_ISREG(os.stat(path, follow_symlinks=follow, **at).st_mode):
        raise FileNotFoundError(errno.ENOENT, "no regular file", path)
    number = os.open(path, _OPEN_FILE if follow else _OPEN_FILE | os.O_NOFOLLOW, **at)
    if not stat.S_ISREG(os.fstat(number).st_mode):          # it was replaced in between
        os.close(number)
        raise FileNotFoundError(errno.ENOENT, "no regular file", path)
    return number


# -- folders

_bad_name = re.compile(r"[\x00\\]").search
_bad_on_windows = re.compile(r'[\x00-\x1f<>:"|?*]|[ .]\Z').search


def _is_served(name, hidden, windows=os.name == "nt"):
    """Whether a file or folder of this name can be asked for; one that begins with a dot only if `hidden`."""
    if not name or name in (".", "..") or _bad_name(name) or name[0] == "." and not hidden:
        return False
    return not (windows and (_bad_on_windows(name) or _is_device(name)))


def _names(rest, hidden):
    """The names on the way to `rest` (decoded, "" or "/…", perhaps with a "/" at its end); None if one cannot be served."""
    names = rest.split("/")[1:]
    if names and not names[-1]:
        del names[-1]
    for place, name in enumerate(names):
        if not _is_served(name, hidden or place == 0 and name == ".well-known"):          # RFC 8615
            return None
    return names


@contextlib.contextmanager
def _walked(directory, names):
    """Open the folder that these names lead to, each relative to the one before and none through a link; a descriptor."""
    flags = _OPEN_FOLDER | getattr(os, "O_PATH", 0)             # O_PATH: a folder on the way need not be readable
    number = os.open(directory, flags)
    try:
        for name in names:
            outer, number = number, os.open(name, flags | os.O_NOFOLLOW, dir_fd=number)
            os.close(outer)
        yield number
    finally:
        os.close(number)


class _Folder:
    """What static_files() makes a handler of."""

    def __init__(self, directory, listing, index, precompressed, max_age, follow_symlinks, hidden, cache_bytes):
        self._directory = os.path.abspath(directory)
        self._listing, self._index, self._precompressed, self._max_age = listing, index, precompressed, max_age
        self._hidden, self._walks, self._follows = hidden, _CAN_WALK and not follow_symlinks, follow_symlinks
        self._cache = _FileCache(cache_bytes)

    async def handle(self, request, rest):
        """Answer a request for what is at `rest` below the folder."""
        if request.method not in ("GET", "HEAD"):
            if request.method == "OPTIONS":
                return Response(204, None, [("Allow", "GET, HEAD, OPTIONS")])
            raise HttpError(405, f"{request.method}: files are only read here", [("Allow", "GET, HEAD, OPTIONS")])
        try:
            found = self._cache.get(rest)
            chosen = found if found is None or not found.siblings else self._choose(request, found)
            if chosen is None or chosen is not found and not chosen.holds():
                names = _names(rest, self._hidden)
                if names is None:
                    raise HttpError(404, "there is no such file")
                found = await flowcoro.to_thread(self._look, names, rest[-1:] == "/", request)
                if type(found) is not _Found:
                    return found
                self._cache.put(rest, found)
                chosen = self._choose(request, found)
            return _file_response(request, chosen, lambda: self._open_known(chosen))
        except OSError as error:
            raise _of_the_system(error) from error

    def _choose(self, request, found):
        """The file itself, or the sibling that the client prefers."""
        if not found.siblings:
            return found
        accepted = request.headers._combined("accept-encoding")
        return found.siblings.get(negotiate_encoding(accepted, found.siblings), found)

    # -- in a thread

    def _look(self, names, slash, request):
        """The _Found that these names lead to, or a Response that has none. OSError."""
        number = self._open(names)
        if number is None:
            if not slash:
                return self._redirect(request)
            if self._index:
                with contextlib.suppress(FileNotFoundError):
                    number = self._open([*names, self._index])
                    names = names if number is None else [*names, self._index]
            if number is None:
                return self._list(names, request)
        elif slash:
            os.close(number)
            raise FileNotFoundError(errno.ENOTDIR, "no folder", names[-1])
        try:
            media_type = _file_type(names[-1])
            siblings = self._siblings(names, media_type, os.fstat(number).st_mtime) if self._precompressed else {}
            return _Found(number, self._path(names), media_type=media_type, max_age=self._max_age, names=names,
                          siblings=siblings)
        finally:
            os.close(number)

    def _siblings(self, names, media_type, modified):
        """{coding: _Found} of what lies beside it, compressed; one that is older is of an earlier state, and passed over."""
        siblings = {}
        for coding, ending in _SIBLINGS:
            its_names = [*names[:-1], names[-1] + ending]
            try:
                number = self._open(its_names)
            except OSError:
                continue
            if number is not None:
                try:
                    if math.floor(os.fstat(number).st_mtime) >= math.floor(modified):
                        siblings[coding] = _Found(number, self._path(its_names), media_type=media_type, names=its_names,
                                                  max_age=self._max_age, coding=coding)
                finally:
                    os.close(number)
        return siblings

    def _path(self, names):
        return os.path.join(self._directory, *names)

    def _open(self, names):
        """A descriptor of a regular file; None if it is a folder. OSError, FileNotFoundError for whatever else there may be."""
        if self._walks and names:
            with _walked(self._directory, names[:-1]) as folder:
                if stat.S_ISDIR(os.stat(names[-1], dir_fd=folder, follow_symlinks=False).st_mode):
                    return None
                return _open_regular(names[-1], dir_fd=folder)
        path = self._path(names)
        if not self._follows and not self._walks:           # the system cannot do better: there is a moment in between
            real = os.path.join(os.path.realpath(self._directory), *names)
            if os.path.normcase(os.path.realpath(path)) != os.path.normcase(real):
                raise FileNotFoundError(errno.ELOOP, "there is a link on the way", path)
        return None if os.path.isdir(path) else _open_regular(path)

    def _open_known(self, found):
        number = self._open(found.names)
        if number is None:
            raise FileNotFoundError(errno.EISDIR, "it is a folder now", found.path)
        return number

    def _redirect(self, request):
        """To the same path with "/" at its end: relative, so that it holds behind a proxy that hides a prefix."""
        last = urllib.parse.quote(urllib.parse.unquote(request.raw_path.rsplit("/", 1)[-1]), safe="")
        query = f"?{request.query_string}" if request.query_string else ""
        return Response(308, None, [("Location", f"./{last}/{query}")])

    def _list(self, names, request):
        """A page that lists a folder, if that is wanted."""
        if not self._listing:
            raise FileNotFoundError(errno.ENOENT, "no index", self._path(names))
        if self._walks:
            with _walked(self._directory, names) as folder:
                number = os.open(".", _OPEN_FOLDER, dir_fd=folder)
            try:
                entries, more = self._entries(number)
            finally:
                os.close(number)
        else:
            entries, more = self._entries(self._path(names))
        return _listing_page(request.path, entries, more, bool(names))

    def _entries(self, folder):
        """[(is no folder, name, size, modified)] sorted, and whether there are more; what could not be got is not shown."""
        entries = []
        with os.scandir(folder) as found:
            for entry in found:
                if len(entries) >= LISTED:
                    break
                if not _is_served(entry.name, self._hidden) or not _is_utf8(entry.name):
                    continue
                with contextlib.suppress(OSError):          # it may be gone by now, or lead nowhere
                    state = entry.stat(follow_symlinks=self._follows)
                    if stat.S_ISDIR(state.st_mode) or stat.S_ISREG(state.st_mode):
                        entries.append((not stat.S_ISDIR(state.st_mode), entry.name, state.st_size, state.st_mtime))
        return sorted(entries), len(entries) >= LISTED


def _is_utf8(name):
    try:
        return bool(name.encode())
    except UnicodeEncodeError:          # a name whose bytes are none has no URL here
        return False


def _listing_page(path, entries, more, has_parent):
    """The Response with the page of a folder."""
    title = html.escape(f"Index of {path}")
    rows = ['<tr><td><a href="../">../</a></td><td></td><td></td></tr>'] if has_parent else []
    for is_file, name, size, modified in entries:
        slash = "" if is_file else "/"
        date = time.strftime("%Y-%m-%d %H:%M", time.gmtime(max(0, min(modified, _END_OF_DATES - 1))))
        rows.append(f'<tr><td><a href="./{urllib.parse.quote(name, safe="")}{slash}">{html.escape(name)}{slash}</a></td>'
                    f"<td>{f'{size:,}' if is_file else ''}</td><td>{date}</td></tr>")
    note = f"<p>Only {len(entries)} are shown.</p>" if more else ""
    page = (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            '<meta name="viewport" content="width=device-width"><style>body{font-family:sans-serif;margin:2em}'
            "td,th{padding:.1em 1.5em .1em 0;text-align:left}td+td{white-space:nowrap}</style>"
            f"</head><body><h1>{title}</h1><table><tr><th>Name</th><th>Bytes</th><th>Changed (UTC)</th></tr>\n"
            + "\n".join(rows) + f"\n</table>{note}</body></html>\n")
    return Response(200, page.encode(), [
        ("Content-Type", "text/html; charset=utf-8"), ("X-Content-Type-Options", "nosniff"), ("Cache-Control", "no-cache"),
        ("Content-Security-Policy", _CSP_OF_PAGES)])


def static_files(directory, *, listing=False, index="index.html", precompressed=True, max_age=None, follow_symlinks=False,
                 hidden=False, cache_bytes=FILE_CACHE):
    """A handler that serves the files of a folder, for Router.mount(): app.mount("/static", static_files("public")).

    listing: whether a folder without an index is answered with a page of what is in it. index: the file that answers for a
    folder; None for none. precompressed: whether `x.br` and `x.gz` beside `x`, if they are not older, are sent to clients that
    prefer them. max_age: seconds for which caches may keep the files. hidden: whether names that begin with a dot are served
    (of others only "/.well-known" is). cache_bytes: bytes of small files that are kept in memory.

    Nothing outside of the folder is sent. Links below it are not followed, unless follow_symlinks says so; then whoever can
    make one there decides what is served. `directory` itself may be a link, and may come to lead elsewhere. Pipes, devices and
    sockets are not found. HEAD, conditions and ranges work as with send_file(); other methods are answered 405.
    NotADirectoryError if it is none.
    """
    if not os.path.isdir(directory):
        raise NotADirectoryError(errno.ENOTDIR, "static_files() serves a folder", os.fspath(directory))
    if index is not None and ("/" in index or not _is_served(index, True)):
        raise ValueError(f"index={index!r}: give the name of a file, or None")
    if max_age is not None:
        cache_control(max_age=max_age)                      # whether it can be one
    return _Folder(directory, listing, index, precompressed, max_age, follow_symlinks, hidden, cache_bytes).handle


# ---- server-sent events ---------------------------------------------------------------------------------------
# WHATWG HTML, section "Server-sent events". A task of its own takes the events from their source, so that a comment can be sent
# when none has come for a while: to cancel the source instead, and ask it again, would end an async generator for good. It lives
# from the first event that is asked for to the end of the stream, however that comes: the server closes what it has sent.

# Seconds without an event after which a comment is sent: proxies cut what is silent (nginx after 60, many load balancers after
# 30), and only what is written tells that the client has gone.
KEEP_ALIVE = 15.0

_split_lines = re.compile("\r\n|\r|\n").split
_not_in_a_field = re.compile("[\r\n\0]").search
_replace_no_characters = re.compile("[\0\ud800-\udfff]").sub


class ServerSentEvent:
    """An event: `data` (str, or what JSON has), `event` its type ("message" if None), `id` what Last-Event-ID says after it, and
    `retry`, the seconds after which the client connects again. data=None sends only the others. Received: `data` is str, `event`
    never None, and `id` the last that the stream has named ("" before).
    """

    __slots__ = ("data", "event", "id", "retry")

    def __init__(self, data=None, event=None, id=None, retry=None):
        for name, text in (("event", event), ("id", id)):
            if text is not None and not isinstance(text, str):
                raise TypeError(f"ServerSentEvent({name}={text!r:.80}): give a str, or None")
            if text is not None and _not_in_a_field(text):
                raise ValueError(f"ServerSentEvent({name}={text!r:.80}): it is one line, so CR, LF and NUL have no place in it")
        if isinstance(data, (bytes, bytearray, memoryview)):
            raise TypeError(f"ServerSentEvent(data={data!r:.80}): an event is text: decode it, or send base64")
        if retry is not None and not (isinstance(retry, (int, float)) and 0 <= retry < math.inf):
            raise ValueError(f"ServerSentEvent(retry={retry!r:.80}): give seconds, from 0")
        if data is None and event is None and id is None and retry is None:
            raise ValueError("ServerSentEvent(): give data, or one of the others")
        self.data, self.event, self.id, self.retry = data, event, id, retry

    def encode(self):
        """The bytes that are sent. Each line of `data` is one of its own; NUL becomes U+FFFD, as does half of a pair."""
        lines = [f"event: {self.event}"] * (self.event is not None) + [f"id: {self.id}"] * (self.id is not None)
        if self.retry is not None:
            lines.append(f"retry: {round(self.retry * 1000)}")
        if self.data is not None:
            text = self.data if isinstance(self.data, str) else flowcoro_schema.encode_json(self.data)
            lines += [f"data: {line}" for line in _split_lines(text)]
        return (_replace_no_characters("\ufffd", "\n".join(lines)) + "\n\n").encode()

    def __eq__(self, other):
        return (isinstance(other, ServerSentEvent) and (self.data, self.event, self.id, self.retry)
                == (other.data, other.event, other.id, other.retry))

    __hash__ = None

    def __repr__(self):
        return f"ServerSentEvent({self.data!r:.80}, event={self.event!r}, id={self.id!r}, retry={self.retry!r})"


def last_event_id(request):
    """What the client has got last: the `id` of an event, when it connects again; None if it has got none. It is a str that the
    client may have made up.
    """
    value = request.headers.get("last-event-id")
    return None if value is None else value.encode("latin-1").decode("utf-8", "replace")


def event_stream(request, events, *, keep_alive=KEEP_ALIVE, retry=None):
    """A Response that sends events as they come, to an EventSource in a browser.

    events: an async iterator of str, ServerSentEvent, or what JSON has (dict, list …), which is sent as JSON. keep_alive: seconds
    after which a comment is sent if none has come; None for none. retry: the seconds after which a client that was cut off
    connects again (3 in most browsers). last_event_id(request) says what it has got before.

    It ends with `events`, with the client, or when the server closes; `events` is closed then. A client asks for it again
    unless it is answered with 204. An error of `events` breaks the answer off.
    """
    if not hasattr(events, "__aiter__"):
        raise TypeError(f"event_stream({events!r:.80}): give an async iterator of events: call the async generator")
    if keep_alive is not None and not (isinstance(keep_alive, (int, float)) and keep_alive > 0):
        raise ValueError(f"event_stream(keep_alive={keep_alive!r}): give seconds, more than 0, or None")
    first = b"" if retry is None else ServerSentEvent(retry=retry).encode()
    response = Response(200, _EventStream(aiter(events), keep_alive, first), [
        ("Content-Type", "text/event-stream; charset=utf-8"), ("Cache-Control", "no-cache, no-transform"),
        ("X-Accel-Buffering", "no")])                       # nginx would gather it, and other proxies compress it
    response.endless = True
    return response


class _EventStream:
    """The stream of an event_stream()."""

    def __init__(self, events, keep_alive, first):
        self._events, self._keep_alive, self._first = events, keep_alive, first
        self._channel, self._task, self._error = flowcoro.Channel(), None, None

    def __aiter__(self):
        return self

    async def __anext__(self):
        if self._first:
            first, self._first = self._first, b""
            return first
        if self._keep_alive is None:
            return _event_bytes(await anext(self._events))
        if self._task is None:
            self._task = flowcoro.spawn(self._pump(), name="events")
        with flowcoro.move_on_after(self._keep_alive):
            try:
                return await self._channel.receive()
            except flowcoro.EndOfChannel:
                error, self._error = self._error, None          # (its frames have us)
                raise error or StopAsyncIteration from None
        return b":\n\n"

    async def _pump(self):
        try:
            async for event in self._events:
                await self._channel.send(_event_bytes(event))
        except Exception as error:              # whoever reads the stream gets it
            self._error = error
        finally:
            self._channel.close()
            await _close_stream(self._events)   # here, so that what it has opened is closed by the task that has opened it

    async def aclose(self):
        """End it: its task is gone when this returns. What `events` cleans up runs cancelled, as after any cancel."""
        if self._task is None:
            return await _close_stream(self._events)
        self._task.cancel()
        with flowcoro.CancelScope(shield=True), contextlib.suppress(flowcoro.TaskCancelled):
            await self._task


def _event_bytes(event):
    return (event if isinstance(event, ServerSentEvent) else ServerSentEvent(event)).encode()


# ---- middleware -----------------------------------------------------------------------------------------------
# Each function gives an `async def middleware(request, call_next)` for app.middleware(). Of those that belong together the
# outermost is added first: trusted_proxies, request_id, access_log, security_headers, cors, compress, etag, rate_limit,
# concurrency_limit, timeout, body_limit, sessions, and who is who. What one refuses is an HttpError, so that error handlers
# and those further out see it.
#
# What needs to know a stream to its end stands around it (_Through); a file stays one that the system sends (_FileStream.done).

# Bytes of content beyond which it is compressed in a thread: 128 KiB of text take 2 to 3 ms, in which nobody else is served.
COMPRESSED_HERE = 128 * 2**10

# Seconds that a session is valid after it was changed: two weeks, as Django's.
SESSION_AGE = 14 * 86400

# Seconds for which a browser remembers what a preflight has been answered: Chrome takes 7200 at most, Firefox 86400; 5 without.
PREFLIGHT_AGE = 600


class _Through:
    """A stream that is another one, piece by piece: take(piece) and then end() give what is sent instead. done() is called once
    when it is over, whether it has come to its end or not; closing it closes the other one.
    """

    def __init__(self, stream, take, end=bytes, done=lambda: None):
        self._stream, self._pieces, self._take, self._end, self._done = stream, None, take, end, done

    def __aiter__(self):
        return self

    async def __anext__(self):
        if self._pieces is None:
            self._pieces = aiter(self._stream)
        async for piece in self._pieces:
            given = piece.encode() if isinstance(piece, str) else piece
            data = self._take(given)
            if data is given:                   # as it came: a first piece says the type by being text, and may be empty
                return piece
            if data:
                return data
        end, self._end = self._end, bytes
        if data := end():
            return data
        raise StopAsyncIteration

    async def aclose(self):
        done, self._done = self._done, lambda: None
        try:
            if self._pieces is not self._stream:
                await _close_stream(self._pieces)
            await _close_stream(self._stream)
        finally:
            done()


async def _drop_content(response):
    """Make it one without content: what it would have sent is closed."""
    stream, response.stream, response.content = response.stream, None, b""
    await _close_stream(stream)
    for name in ("content-type", "content-length", "content-encoding", "content-language", "content-range", "accept-ranges"):
        response.headers.remove(name)


# -- the log

_replace_unsafe = re.compile(r'[^\x20-\x7e]|["\\]').sub


def _log_text(text):
    """For a quoted place in a line: no quotes, and nothing that could begin another line or speak to a terminal."""
    return _replace_unsafe(lambda found: "".join(f"\\x{byte:02x}" for byte in found[0].encode("utf-8", "surrogatepass")), text)


def _log_word(text):
    """For a place that ends at a space."""
    return _log_text(str(text)).replace(" ", "\\x20") if text else "-"


@functools.lru_cache(8)                         # requests end in this second, or in one of the last
def _log_date(second):
    year, month, day, hours, minutes, seconds = time.gmtime(second)[:6]
    return f"{day:02d}/{_MONTHS[month - 1]}/{year:04d}:{hours:02d}:{minutes:02d}:{seconds:02d} +0000"


def _client_text(request):
    client = request.client
    return client[0] if isinstance(client, tuple) else str(client or "unix")


def _common_line(request, status, sent, seconds, now):
    """Apache's common log format: host ident user [date] "request line" status bytes."""
    return (f'{_log_word(_client_text(request))} - {_log_word(getattr(request, "user", None))} [{_log_date(int(now))}] '
            f'"{_log_text(request.method)} {_log_text(request.target)} HTTP/{request.version}" {status} {sent or "-"}')


def _json_line(request, status, sent, seconds, now):
    """A line of JSON; its text is ASCII."""
    fields = {"time": round(now, 3), "client": _client_text(request), "method": request.method, "target": request.target,
              "version": request.version, "status": status, "bytes": sent, "seconds": round(seconds, 6)}
    for name, value in (("user", getattr(request, "user", None)), ("request_id", getattr(request, "request_id", None)),
                        ("host", request.host), ("referer", request.headers.get("referer")),
                        ("user_agent", request.headers.get("user-agent"))):
        if value:
            fields[name] = str(value)
    return json.dumps(fields)


_LOG_FORMATS = {"common": _common_line, "json": _json_line}


def access_log(to=None, *, format="common"):
    """Write a line for each request, when its answer is complete: for a stream at its end.

    to: a stream with write(), which gets the line and a line end, or a function that gets the line; None: sys.stderr. format:
    "common" (Apache's; `user` is request.user, times are UTC), or "json" (an object with time, client, method, target, status,
    bytes of content, seconds from the request's arrival here to the end of its answer, and, where they are, user, request_id,
    host, referer and user_agent). A request whose client has gone before there was an answer has the status 499.

    Whatever a client sends stays within its place in the line: quotes, backslashes and all but printable ASCII are written \\xHH
    (in JSON \\uHHHH). An error of `to` is reported to sys.unraisablehook, and the answer sent all the same.
    """
    if format not in _LOG_FORMATS:
        raise ValueError(f'access_log(format={format!r}): "common" or "json"')
    if to is not None and not callable(to) and not hasattr(to, "write"):
        raise TypeError(f"access_log({to!r:.80}): give a stream with write(), or a function of a line")
    line_of = _LOG_FORMATS[format]

    def write(request, status, sent, began):
        try:
            line = line_of(request, status, sent, flowcoro.now() - began, time.time())
            if callable(to):
                to(line)
            else:
                (sys.stderr if to is None else to).write(line + "\n")
        except Exception as error:
            flowcoro.report_error(error, "the access log could not be written", "flowcoro_http")

    async def middleware(request, call_next):
        began = flowcoro.now()
        try:
            response = await call_next(request)
        except BaseException:                           # cancelled: nobody gets an answer
            write(request, 499, 0, began)
            raise
        stream, status, counted = response.stream, response.status, 0
        if request._source is not None and request._source.upgraded:
            status = 101                                    # that is what was sent; the handler's own answer goes nowhere

        def count(piece):
            nonlocal counted
            counted += len(piece)
            return piece

        if stream is None:
            write(request, status, 0 if request.method == "HEAD" else len(response.content), began)
        elif type(stream) is _FileStream:
            stream.done.append(lambda sent: write(request, status, sent, began))
        else:
            response.stream = _Through(stream, count, done=lambda: write(request, status, counted, began))
        return response
    return middleware


# -- who may read it

_is_origin = re.compile(r"[a-z][a-z0-9+.-]*://(?:[0-9a-z._-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?").fullmatch
_origin_pattern = re.compile(r"([a-z][a-z0-9+.-]*://)(\*\.)?([0-9a-z._-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5}|:\*)?").fullmatch


def _origin_test(patterns):
    """A function that says whether an origin fits one of them."""
    exact, others = set(), []
    for pattern in patterns:
        found = _origin_pattern(pattern)
        if found is None and pattern != "null":
            raise ValueError(f'cors(): {pattern!r:.80} is no origin: "https://example.com", with a port if it is not the usual '
                             'one, lower-case and without a path; "https://*.example.com" for all hosts below, ":*" for all '
                             'ports; "null"; or origins="*"')
        if found is not None and (found[2] or found[4] == ":*"):
            others.append((found[1], found[2] and "." + found[3], found[3], found[4]))
        else:
            exact.add(pattern)

    def fits(origin):
        if origin in exact:
            return True
        if not others or not _is_origin(origin):
            return False
        scheme, _, rest = origin.partition("://")
        host, port = re.fullmatch(r"(.*?)(:[0-9]+)?", rest).groups()
        return any(scheme + "://" == its_scheme and (host.endswith(ending) and host != ending if ending else host == name)
                   and its_port in (":*", port) for its_scheme, ending, name, its_port in others)
    return fits


def cors(origins, *, methods=("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"), headers=(), expose=(), credentials=False,
         max_age=PREFLIGHT_AGE):
    """Let pages of other origins read the answers (Cross-Origin Resource Sharing; WHATWG Fetch, section 3.3).

    origins: "*" for all, or a list: "https://example.com", "https://*.example.com" (any host below), "http://localhost:*" (any
    port), "null". methods, headers: what their requests may have; headers="*" for any but Authorization, which has to be named.
    expose: header fields of answers that they may see. credentials: whether cookies may come along, for a list of origins only.
    max_age: seconds for which a browser remembers what it was told. Preflights are answered here: 204, or 403.

    It does not keep anybody from sending: what changes something has to check who asks. ValueError for what browsers refuse.
    """
    if credentials and (origins == "*" or "*" in headers):
        raise ValueError('cors(credentials=True) needs lists of origins and headers: with "*" any page could act as its reader')
    if isinstance(origins, str) and origins != "*":
        raise TypeError(f"cors({origins!r:.80}): give a list of origins, or \"*\"")
    names = [*methods, *(headers if headers != "*" else ()), *expose]
    if bad := [name for name in names if not _is_token(name)]:
        raise ValueError(f"cors(): {bad[0]!r:.80} is no name of a method or a header field")
    fits, anybody = (None, True) if origins == "*" else (_origin_test(origins), False)
    allowed = [("Access-Control-Allow-Credentials", "true")] * credentials
    exposed = [("Access-Control-Expose-Headers", ", ".join(expose))] * bool(expose)
    answers = [("Access-Control-Allow-Methods", ", ".join(methods)), ("Access-Control-Max-Age", str(max_age))]
    if headers:
        answers.append(("Access-Control-Allow-Headers", "*" if headers == "*" else ", ".join(headers)))

    def preflight(origin):
        if origin is None:
            raise HttpError(403, "pages of this origin may not send that: it is not among those of cors()", [("Vary", "Origin")])
        response = Response(204, None, [("Access-Control-Allow-Origin", origin), *allowed, *answers])
        _add_vary(response.headers, "Origin", "Access-Control-Request-Method", "Access-Control-Request-Headers")
        return response

    async def middleware(request, call_next):
        sent = request.headers.get_all("origin")
        origin = ("*" if anybody else sent[0] if fits(sent[0]) else None) if len(sent) == 1 else None
        if request.method == "OPTIONS" and sent and "access-control-request-method" in request.headers:
            return preflight(origin)
        response = await call_next(request)
        if not anybody:
            _add_vary(response.headers, "Origin")           # also for those without: a cache must not give them to others
        if origin is not None:
            for name, value in (("Access-Control-Allow-Origin", origin), *allowed, *exposed):
                response.headers.set(name, value)
        return response
    return middleware


# -- what it is sent as

def compress(*, min_bytes=MIN_COMPRESSED, level=COMPRESSION_LEVEL, flush=True):
    """Compress answers for clients that accept it, by gzip or deflate; what that changes in the headers is done too.

    Not what is smaller than `min_bytes`, compressed in itself or by the handler, partial, or forbids it (no-transform); nor a
    stream without a media_type of the handler's, which its first piece says too late. level: 1 to 9. flush: whether each piece of
    a stream gets through at once, as its handler has meant it; False: when there is enough of it, which makes many small pieces
    smaller. (Events always do; files never.)

    An attacker who can make a browser ask, and sees how long the answers are, learns what a secret in them is if something of his
    own choice stands in them too (BREACH): keep this away from such routes, or have tokens masked.
    """
    if not (type(level) is int and 1 <= level <= 9):
        raise ValueError(f"compress(level={level!r}): an int from 1 to 9")

    def all_of(coding, content):
        encoder = _Encoder(coding, level=level)
        return encoder.encode(content) + encoder.finish()

    async def middleware(request, call_next):
        response = await call_next(request)
        headers, stream = response.headers, response.stream
        if response.status == 304:                          # it says what its 200 would have said, which is not known here:
            _add_vary(headers, "Accept-Encoding")           # the client knows which tag that had
            tag = headers.get("etag")
            if tag is not None and f"W/{tag}" in request.headers._combined("if-none-match"):
                headers.set("ETag", f"W/{tag}")
            return response
        length = int(headers.get("content-length", sys.maxsize if stream is not None else len(response.content)))
        accepted = request.headers.get_all("accept-encoding")
        coding, depends = _choose_compression(", ".join(accepted) if accepted else None, response.status, headers, length,
                                              min_bytes=min_bytes)
        _compressed_headers(headers, coding, depends)
        if coding is None:
            return response
        if stream is None:
            content = response.content
            if not content:                                 # HEAD, of what would be a stream
                response.content, response.stream = None, _Asynchronous(iter(()))
                return response
            response.content = (all_of(coding, content) if len(content) <= COMPRESSED_HERE else
                                await flowcoro.to_thread(all_of, coding, content))
            return response
        encoder = _Encoder(coding, level=level)
        if response.endless or flush and type(stream) is not _FileStream:
            response.stream = _Through(stream, lambda piece: encoder.encode(piece) + encoder.flush(), encoder.finish)
        else:
            response.stream = _Through(stream, encoder.encode, encoder.finish)
        return response
    return middleware


def etag(*, weak=False):
    """Give complete answers to GET and HEAD an entity tag, made of their content, and answer 304 to who has got it already.

    It spares the way, not the handler. A tag that the handler has set is taken as it is; answers with Cache-Control: no-store,
    streams, and all but 200 are left alone. weak: "equivalent" rather than "equal to the byte". RFC 9110 sections 8.8.3 and 13.
    """
    async def middleware(request, call_next):
        response = await call_next(request)
        headers = response.headers
        if response.status != 200 or request.method not in ("GET", "HEAD") or not response.content or (
                "no-store" in headers._combined("cache-control").lower()):
            return response
        tag = headers.get("etag")
        if tag is None:
            tag = _content_tag(response.content, weak=weak)
            headers.set("ETag", tag)
        now = time.time()
        status = _evaluate(request.method, request.headers, now=now, etag=tag,
                           last_modified=_date_or_none(headers, "last-modified", now)).status
        if status == 304:
            await _drop_content(response)
            response.status, response.reason = 304, None
        elif status == 412:
            raise HttpError(412, "it is not what If-Match or If-Unmodified-Since say", [("ETag", tag)])
        return response
    return middleware


_HARDENED = {
    "content_security_policy": ("Content-Security-Policy", "default-src 'self'; object-src 'none'; base-uri 'self'; "
                                "form-action 'self'; frame-ancestors 'none'"),
    "frame_options": ("X-Frame-Options", "DENY"),
    "referrer_policy": ("Referrer-Policy", "strict-origin-when-cross-origin"),
    "permissions_policy": ("Permissions-Policy", "camera=(), geolocation=(), microphone=()"),
    "opener_policy": ("Cross-Origin-Opener-Policy", "same-origin"),
    "resource_policy": ("Cross-Origin-Resource-Policy", "same-origin"),
}


def security_headers(*, hsts=31_536_000, hsts_subdomains=False, hsts_preload=False, **policies):
    """Add the header fields that have a browser allow less; one that a handler has set stays as it is.

    hsts: seconds for which a browser uses https only (Strict-Transport-Security; None: not sent; it is sent over https alone);
    hsts_subdomains, hsts_preload: for all hosts below it, and for the lists in browsers: hard to take back. Besides
    X-Content-Type-Options: nosniff there are these, each of which may be another str, or None to leave it out:
    content_security_policy (all from here, no frames around it), frame_options, referrer_policy, permissions_policy,
    opener_policy, resource_policy.
    """
    if unknown := policies.keys() - _HARDENED.keys():
        raise TypeError(f"security_headers() has no {min(unknown)}=; it has {', '.join(_HARDENED)}, hsts")
    fields = [("X-Content-Type-Options", "nosniff")]
    for key, (name, usual) in _HARDENED.items():
        value = policies.get(key, usual)
        if value is not None:
            fields.append((name, value))
    Headers(fields)                                         # whether they can be sent
    over_tls = fields if hsts is None else [*fields, ("Strict-Transport-Security", _strict_transport_security(
        hsts, include_subdomains=hsts_subdomains, preload=hsts_preload))]

    async def middleware(request, call_next):
        response = await call_next(request)
        headers = response.headers
        for name, value in over_tls if request.scheme == "https" else fields:
            if name not in headers:
                headers.add(name, value)
        return response
    return middleware


# -- limits

def body_limit(max_bytes):
    """Refuse requests (413) whose content has more than `max_bytes`: at once if they say so, else when it is received."""
    if type(max_bytes) is not int or max_bytes < 0:
        raise ValueError(f"body_limit({max_bytes!r}): give bytes, an int from 0")

    async def middleware(request, call_next):
        announced = request.headers.get("content-length")
        if announced is not None and int(announced) > max_bytes or len(request.content or b"") > max_bytes:
            raise HttpError(413, f"the content has more than {max_bytes} bytes, which is what is taken here")
        request.max_body = max_bytes if request.max_body is None else min(max_bytes, request.max_body)
        return await call_next(request)
    return middleware


def timeout(seconds, *, status=503):
    """Cancel a handler that has not answered after so many seconds, and answer for it: 503, or 504 for a gateway.

    It counts until there is a Response, or upgrade() has made another protocol of it; what a stream sends later it does not
    limit. What never awaits cannot be cancelled.
    """
    if not (isinstance(seconds, (int, float)) and seconds > 0):
        raise ValueError(f"timeout({seconds!r}): give seconds, more than 0")
    if status not in (503, 504):
        raise ValueError(f"timeout(status={status!r}): 503 or 504")

    async def middleware(request, call_next):
        with flowcoro.move_on_after(seconds) as scope:
            request._deadlines = (*request._deadlines, scope)
            return await call_next(request)
        raise HttpError(status, f"there was no answer within {seconds:g} s")
    return middleware


@functools.lru_cache(1024)                      # 10 µs for an address of IPv6
def _client_network(address):
    """What an address is counted as: one of IPv6 by its /64, since a client has all of that."""
    try:
        parsed = ipaddress.IPv6Address(address)
    except ValueError:                              # of IPv4, or "unknown"
        return address
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return f"{ipaddress.IPv6Address(int(parsed) >> 64 << 64)}/64"


def _client_key(request):
    client = request.client
    return _client_network(client[0]) if isinstance(client, tuple) else "unix"


async def _acquired(limiter, *arguments):
    """(what acquire() gives, None), or (None, the error of a limiter that has none to give)."""
    try:
        return await limiter.acquire(*arguments), None
    except flowcoro.FlowCoroError as error:
        if not hasattr(error, "retry_after"):
            raise
        return None, error


def _check_limiter(limiter, given_to, *names):
    if isinstance(limiter, type):
        raise TypeError(f"{given_to}({limiter!r:.80}): that is a class; give a limiter")
    if missing := [name for name in names if not hasattr(limiter, name)]:
        raise TypeError(f"{given_to}({limiter!r:.80}): it has no {missing[0]}; give a limiter that has {', '.join(names)}")


def _whole_seconds(seconds):
    """For Retry-After: rounded up, and 1 at least, so that nobody asks again at once."""
    return max(1, math.ceil(seconds or 0))


def rate_limit(limiter, *, key=_client_key, cost=1, name="default"):
    """Let so many requests through as a limiter allows; the others are answered 429, with Retry-After.

    limiter: a RateLimiter of flowcoro_resilience, or what has its `await acquire(key, cost)` (an error with `retry_after`:
    seconds, if it must not be), state_of(key) (with `remaining` and `reset`: seconds until all is there again) and numbers
    `rate`, `per` and `burst`. If the limiter lets calls wait, requests do. key: function of a request: who it is counted for, by
    default request.client, an address of IPv6 by its /64 (behind proxies add trusted_proxies() first); None: it is not counted.
    cost: units that a request takes, more than 0, a number or a function of it; more than `burst` can never be, and is answered
    429 without Retry-After. With HttpServer.run(processes=) each process counts for itself, so together they let through as many
    times what the limiter says. name: of the limit, for clients who have several.

    Each answer says what is left, in RateLimit-Policy and RateLimit (draft-ietf-httpapi-ratelimit-headers-10), and also in
    RateLimit-Limit, -Remaining and -Reset of its revisions up to 06, which is what most clients read; of several limits that
    have passed it on, these say what the one with least left does. Units are whole, rounded down; seconds too, rounded up.
    """
    _check_limiter(limiter, "rate_limit", "acquire", "state_of", "rate", "per", "burst")
    if not callable(key) or inspect.iscoroutinefunction(key):
        raise TypeError(f"rate_limit(key={key!r:.80}): give a plain function of a request, which says who it is counted for")
    if inspect.iscoroutinefunction(cost) or not callable(cost) and (
            isinstance(cost, bool) or not isinstance(cost, (int, float)) or not 0 < cost <= limiter.burst):
        raise ValueError(f"rate_limit(cost={cost!r:.80}): give a number of units from more than 0 to {limiter.burst:g}, which is "
                         "what the limiter ever lets through at once, or a plain function of a request")
    if not (isinstance(name, str) and name and name.isascii() and name.isprintable()):
        raise ValueError(f"rate_limit(name={name!r:.80}): give printable ASCII, which a header field can have")
    quota, quoted = int(limiter.burst), _quote(name)
    policy = f"{quoted};q={quota};w={_whole_seconds(limiter.burst * limiter.per / limiter.rate)}"
    refused = f"more than {limiter.rate:g} in {limiter.per:g} s, which is the limit {quoted}"

    def fields(state, wait):
        left, reset = int(state.remaining), wait or math.ceil(state.reset)
        return [("RateLimit-Policy", policy), ("RateLimit", f"{quoted};r={left};t={reset}")], [
            ("RateLimit-Limit", str(quota)), ("RateLimit-Remaining", str(left)), ("RateLimit-Reset", str(reset))]

    async def middleware(request, call_next):
        whose, units = key(request), cost(request) if callable(cost) else cost
        if whose is None:
            return await call_next(request)
        if units > limiter.burst:
            raise HttpError(429, f"this asks for {units:g} at once: {refused}, and {quota} is the most it ever lets through")
        _, error = await _acquired(limiter, whose, units)
        if error is not None:
            wait = _whole_seconds(error.retry_after)
            current, older = fields(limiter.state_of(whose), wait)
            raise HttpError(429, f"{refused}: ask again in {wait} s", [*current, *older, ("Retry-After", str(wait))])
        current, older = fields(limiter.state_of(whose), None)
        response = await call_next(request)
        headers = response.headers
        for field in current:
            headers.add(*field)
        before = headers.get("ratelimit-remaining")
        if before is None or not _is_digits(before) or int(before) >= int(older[1][1]):
            for field in older:
                headers.set(*field)
        return response
    return middleware


def concurrency_limit(limiter):
    """Let so many requests be handled at a time as a limiter allows; the others are answered 503, with Retry-After.

    limiter: a ConcurrencyLimiter of flowcoro_resilience, or what has its `await acquire()` (an error with `retry_after`, seconds
    or None, if there is no place), which gives something with release(outcome): "done"; "dropped" after a 503 or 504;
    "ignored" if the request was cancelled. It counts until there is a Response, or a WebSocket's handler has ended; what a
    stream sends later does not count. timeout() belongs within, so that an adaptive limiter hears of it.
    """
    _check_limiter(limiter, "concurrency_limit", "acquire")
    if hasattr(limiter, "state_of"):
        raise TypeError(f"concurrency_limit({limiter!r:.80}): that limits a rate; give it to rate_limit()")

    async def middleware(request, call_next):
        permit, error = await _acquired(limiter)
        if error is not None:
            raise HttpError(503, "too many requests are under way: ask again later",
                            [("Retry-After", str(_whole_seconds(error.retry_after)))])
        outcome = "ignored"
        try:
            response = await call_next(request)
            outcome = "dropped" if response.status in (503, 504) else "done"
            return response
        finally:
            permit.release(outcome)
    return middleware


# -- who asks

def trusted_proxies(networks, *, field="x-forwarded"):
    """Behind proxies of yours: have request.client, scheme and host say what is true of the client rather than of the last proxy.

    networks, field: as TrustedProxies takes them. request.peer becomes the address of the connection; the port of a client behind
    a proxy is 0, and its address "unknown" if the proxy hides it. ProtocolError (400) for what a trusted one has malformed. To be
    added first: what stands further out sees the proxy.
    """
    proxies = TrustedProxies(networks, field=field)

    async def middleware(request, call_next):
        peer = request.peer = request.client
        address = peer[0] if isinstance(peer, tuple) else None
        said = proxies.client(address, request.headers)
        if said.client != address:
            request.client = (said.client or "unknown", 0)
        if said.scheme is not None:
            request.scheme = said.scheme
        if said.host is not None:
            request.host = said.host
        return await call_next(request)
    return middleware


_is_request_id = re.compile(r"[0-9A-Za-z._~+/=:-]{1,128}").fullmatch


def request_id(*, field="X-Request-ID", trusted=()):
    """Give each request an id: request.request_id, and a header field of its answer.

    One that comes with a request is taken if it is 1 to 128 letters, digits and ._~+/=:-, and comes from an address that
    `trusted` names (as for TrustedProxies); else it is 32 random hexadecimal digits.
    """
    proxies = TrustedProxies(trusted)
    Headers([(field, "x")])

    async def middleware(request, call_next):
        peer = getattr(request, "peer", request.client)
        given = request.headers.get_all(field)
        if len(given) == 1 and _is_request_id(given[0]) and proxies.trusts(peer[0] if isinstance(peer, tuple) else None):
            request.request_id = given[0]
        else:
            request.request_id = secrets.token_hex(16)
        response = await call_next(request)
        response.headers.set(field, request.request_id)
        return response
    return middleware


def _verifier(known, what):
    """A function (*credentials) -> who it is, awaitable or not; of a dict one that takes as long whether there is such a name."""
    if callable(known):
        return known
    if not isinstance(known, dict) or not all(isinstance(text, str) for pair in known.items() for text in pair):
        raise TypeError(f"{what}: give a dict of str, or a function")
    hashed = [(hashlib.sha256(name.encode()).digest(), value) for name, value in known.items()]

    def verify(name, password=None):
        given, who = hashlib.sha256(name.encode()).digest(), None
        for digest, value in hashed:
            if hmac.compare_digest(digest, given):
                who = value
        if password is None:
            return who
        return hmac.compare_digest((who or "").encode(), password.encode()) and who is not None
    return verify


def _authenticate(read, verify, challenge, failed):
    """The middleware of both: read(value) gives the credentials as a tuple, None if they are of another scheme; verify(*them)
    whom request.user is to be.
    """
    async def middleware(request, call_next):
        values, credentials, who = request.headers.get_all("authorization"), None, None
        if len(values) == 1:
            with contextlib.suppress(ProtocolError):
                credentials = read(values[0])
        if credentials is not None:
            who = verify(*credentials)
            if inspect.isawaitable(who):
                who = await who
        if not who:
            raise HttpError(401, "who are you?" if not values else "these credentials are not accepted",
                            [("WWW-Authenticate", failed if values else challenge)])
        request.user = who
        return await call_next(request)
    return middleware


def basic_auth(users, *, realm="this server"):
    """Let through who has a name and a password (RFC 7617): request.user is the name. Others are answered 401, with `realm`.

    users: {name: password}, compared in constant time; or a function (name, password), async or not, that returns whether they
    are right, or whom request.user is to be. Passwords belong hashed into a store, and hashing into a thread:
    `await flowcoro.to_thread(check, …)`. Without TLS everybody on the way can read them.
    """
    known = _verifier(users, "basic_auth(users)")

    async def verify(name, password):
        who = known(name, password)
        if inspect.isawaitable(who):
            who = await who
        return name if who is True else who

    challenge = _challenge("Basic", realm=realm, charset="UTF-8")
    return _authenticate(_parse_basic, verify, challenge, challenge)


def bearer_auth(tokens, *, realm="this server"):
    """Let through who has a token (RFC 6750): request.user is whom it belongs to. Others are answered 401, with `realm`.

    tokens: {token: user}, compared in constant time; or a function (token), async or not, that returns the user, or None.
    """
    def read(value):
        token = _parse_bearer(value)
        return None if token is None else (token,)

    return _authenticate(read, _verifier(tokens, "bearer_auth(tokens)"), _challenge("Bearer", realm=realm),
                         _challenge("Bearer", realm=realm, error="invalid_token"))


def sessions(keys, *, cookie="__Host-session", max_age=SESSION_AGE, domain=None, path="/", secure=True, same_site="Lax"):
    """Give each request a dict, request.session, which comes back with the client's next one: in a cookie that is signed.

    keys: one secret of 16 bytes or more, or several, the newest first: that one signs, the others are taken as well, until you
    drop them. What is in the dict has to be JSON, and fits with its signature into 4 KiB; the client can read it, but not change
    it, nor can you take it back before `max_age` seconds after its last change are over. What is no session of ours is an empty
    one. The cookie is sent when the dict was changed, before the answer begins, and deleted when it was emptied; scripts do not
    see it. secure=False (with another name: `__Host-` needs TLS) is for what runs without. ValueError for what browsers drop, and
    (500) for a session that is too large.
    """
    signer = Signer(keys, purpose=f"session {cookie}")
    attributes = {"domain": domain, "path": path, "secure": secure, "http_only": True, "same_site": same_site}
    _set_cookie(cookie, "", max_age=max_age, **attributes)              # whether browsers take it

    def load(request):
        value = request.cookies.get(cookie)
        if value:
            with contextlib.suppress(SignatureError, ValueError):
                session = json.loads(signer.verify(value, time.time(), max_age=max_age))
                if isinstance(session, dict):
                    return session
        return {}

    async def middleware(request, call_next):
        request.session = load(request)
        before = flowcoro_schema.encode_json(request.session)
        response = await call_next(request)
        if not isinstance(request.session, dict | None):
            raise TypeError(f"request.session is {request.session!r:.80}: it has to be a dict, or None for an empty one")
        after = flowcoro_schema.encode_json(request.session or {})
        if before == "{}" == after:
            return response
        _add_vary(response.headers, "Cookie")
        if after == before:
            return response
        if after == "{}":
            response.delete_cookie(cookie, **attributes)
        else:
            response.set_cookie(cookie, signer.sign(after.encode(), time.time()), max_age=max_age, **attributes)
        if "cache-control" not in response.headers:
            response.headers.set("Cache-Control", "no-store")
        return response
    return middleware


# ---- client ---------------------------------------------------------------------------------------------------
#
# A request goes through four loops, each in the other: redirects and authentication (_follow), retries (_attempts), a second
# connection in place of a stale one (_ClientExchange.run), and the pieces of one exchange. A connection belongs to its exchange
# from the pool's acquire() until it is given back or discarded; and with stream() to the response after that.
#
# A policy stands between the second loop and the third: what it lets through, repeats or sends twice is an exchange with one
# origin (_Operation), so that a breaker counts what each server does, and not what a redirect leads to. Of policies this file
# knows nothing but `await policy.try_execute(operation, request)`, so that it is of use without them.
#
#     K1  a connection goes back to its pool only when both messages are complete, nothing more has come, and no error, timeout
#         or cancellation has struck since it was taken; in all other cases it is closed
#     K2  a kept connection from which anything can be read, an end too, is not used: what has come is no answer to what has not
#         been asked. (A recv() with MSG_PEEK before each request: 1 µs.) What ends between that look and the answer's first
#         byte is tried once more on a new connection, if the method is idempotent (RFC 9110 9.2.2)
#     K3  one scope for each exchange; its deadline is moved from phase to phase, which costs no timer where nothing is late
#     K4  what is secret (Authorization, Cookie, auth=, cookies=) never leaves the origin that it was given for
#
# The ordinary GET is written out for speed: its URL, its place in the pool and the bytes of its head are remembered.

# Redirects in a row at most. Chrome and Firefox 20, curl 50, RFC 2068 had 5.
MAX_REDIRECTS = 20

# Informational responses before a response at most. There are two in earnest, 100 and 103; Go allows 5.
MAX_INFORMATIONAL = 16

# Bytes of content that are read and dropped of a redirect in stream(), so that its connection can be used again, and seconds for
# that: a new connection takes less than either.
MAX_DROPPED, DROP_TIMEOUT = 64 * 2**10, 0.5

# Bytes of a request that leave in one write, head and content; bytes of a file that are read at a time, and of a response.
WHOLE_REQUEST, UPLOAD_PIECE, RECEIVED_PIECE = 64 * 2**10, 256 * 2**10, 64 * 2**10

# URLs that a client remembers, characters of each at most, and origins to which it keeps connections: beyond them the oldest
# goes.
KNOWN_URLS, KNOWN_URL, KEPT_ORIGINS = 1024, 512, 256

# Connections to one origin at most, and seconds that an idle one is kept. nginx closes after 75, Apache after 5, Node after 5.
CONNECTIONS_PER_ORIGIN, KEPT_IDLE = 100, 30.0

# Cookies that a client keeps, of one domain and altogether. Chrome keeps 180 and 3300.
MAX_OF_DOMAIN, MAX_JAR = 180, 3000

# Bytes of one server-sent event, and of one line of a response; failures in a row after which EventStream gives up.
MAX_EVENT, MAX_LINE, MAX_EVENT_FAILURES = 2**20, 2**20, 10

# Seconds until it connects again, if the server names none (Chrome 3, Firefox 5), and at most after failures.
EVENT_RETRY, MAX_EVENT_RETRY = 3.0, 60.0

# What each response gives back of the budget that a client has for retries (gRPC: a tenth to all, as the server wants).
RETRY_GIVEN_BACK = 0.1

# Pieces of an inflated content from one checkpoint to the next: a MiB, which takes zlib one to three milliseconds.
INFLATED_A_TURN = 16

# What a retry can do no harm to, and what changes nothing at all. RFC 9110 9.2.
_IDEMPOTENT = frozenset(["GET", "HEAD", "PUT", "DELETE", "OPTIONS", "TRACE"])

_CLIENTS = object()             # instead of an option: what the client has


class RequestError(flowcoro.FlowCoroError):
    """A request of HttpClient has not got what it was made for. `request`: the ClientRequest; `response`: if there was one.

    RequestError
      ConnectError     there is no connection: no such name, refused, no trust (TLS); nothing was sent
        ProxyError     … because the proxy does not make one
      TransferError    the connection broke, or ended too early: an unknown part was sent, or received
      RequestTimeout   also a TimeoutError; `phase` says of what: "connect", "head", "read", "total"
      ResponseError    what came is no HTTP, or more than a limit, or its content is not what its coding says
      RedirectError    too many redirects, or one that cannot be followed
      StatusError      raise_for_status(): the status is 400 or more; `retry_after`: the response's

    `sent`: False if nothing was sent, as of each ConnectError, and a RequestTimeout while connecting: the server has not acted on
    it. Else None: it may have. Retry of flowcoro_resilience goes by that. With a policy there is also what the policy raises
    instead of a request: its Rejected, as it is, which is no RequestError.
    """

    request = response = sent = None


class ConnectError(RequestError):
    """No connection could be made, so nothing was sent. Its `__cause__` is the network's error."""

    sent = False


class ProxyError(ConnectError):
    """The proxy does not connect: `status` is its answer to CONNECT, None if it gave none."""

    status = None


class TransferError(RequestError):
    """The connection broke or ended in the middle. Of the request an unknown part was sent; the server may have acted on it."""


class RequestTimeout(RequestError, TimeoutError):
    """A time limit has passed: `phase` "connect" (with the wait for a place in the pool), "head", "read" or "total"."""

    phase = None


class ResponseError(RequestError):
    """The server, or who is between, sent no HTTP, or more than a limit, or a content that cannot be decoded."""


class RedirectError(RequestError):
    """A redirect that is not followed: too many, to no http URL, or with a content that cannot be sent again."""


class StatusError(RequestError):
    """The response's status is 400 or more: `response`. `retry_after`: as the response has it."""

    retry_after = None


def _with(error, request, response=None):
    """The same error, which knows whose it is."""
    error.request, error.response = request, response
    return error


class Timeouts(typing.NamedTuple):
    """Limits in seconds; None for none.

    connect: until there is a connection, a place in the pool and TLS included. head: from the end of the request to the end of
    the response's head. read: each wait for more of a content, either way. total: all of it, with redirects and retries; for
    stream() until the head is there, since from then on the time is the caller's.
    """

    connect: float | None = 10.0
    head: float | None = 30.0
    read: float | None = 30.0
    total: float | None = 300.0

    def _limits(self):
        """As numbers that are compared; ValueError, TypeError."""
        for name, seconds in zip(self._fields, self):
            if seconds is not None and (isinstance(seconds, bool) or not isinstance(seconds, (int, float))):
                raise TypeError(f"timeout: {name}={seconds!r} is no number of seconds")
            if seconds is not None and not seconds > 0:
                raise ValueError(f"timeout: {name}={seconds!r}: give more than 0 seconds, or None for no limit")
        return Timeouts(*[math.inf if seconds is None else float(seconds) for seconds in self])


def _as_timeouts(timeout, total):
    """timeout=: Timeouts; a number: seconds for connect, head and read each; None: no limit at all."""
    if isinstance(timeout, Timeouts):
        return timeout._limits()
    return Timeouts(timeout, timeout, timeout, None if timeout is None else total)._limits()


class Retries(typing.NamedTuple):
    """How often and when a request is tried again.

    count: times at most, for each request. statuses: of responses after which it is. wait: seconds before the first one,
    doubled each time, and of that half to all, by chance; a Retry-After of the server counts instead, and one of more than
    max_wait seconds ends it: you get the response. budget: retries that all requests of a client have together; each success
    gives a tenth of one back, so that a server that is down is not hit by a multiple of the load (gRPC's retry throttling).

    After a ConnectError any request is tried again, after everything else those with an idempotent method; and only if the
    content can be sent again (bytes, files that can seek). For more (circuit breakers, hedges, a budget that several clients
    share) give policy= a pipeline with a Retry of flowcoro_resilience, and leave this one at 0: each attempt of it goes through
    the policy, so that both together make the product of their attempts.
    """

    count: int = 2
    statuses: tuple = (429, 502, 503, 504)
    wait: float = 0.25
    max_wait: float = 30.0
    budget: float = 10.0


# -- URLs

_URL = re.compile(r"([A-Za-z][0-9A-Za-z+.-]*)://(?:([^/?#@\\]*)@)?(\[[0-9A-Fa-f:.]+\]|[^/?#@:\\\[\]]+)(?::([0-9]{1,5})?)?"
                  r"(/[^?#]*)?(\?[^#]*)?(?:#.*)?")
_CONTROLS = re.compile(r"[\x00-\x1f\x7f]")
_ENCODED = re.compile(rf"[^{_TARGET_CHARS}]")
_PORTS = {"http": 80, "https": 443}
_shown_url = re.compile(r"(?<=://).*@", re.DOTALL).sub     # to the last @: a password may have what it must not

# Python's codec is of IDNA 2003, which makes fass.de of faß.de; browsers ask another host (the deviations of UTS 46).
_is_ambiguous = re.compile("[\u00df\u1e9e\u03c2\u200c\u200d]").search


class _Url:
    """An http or https URL, taken apart: what a request needs of it."""

    __slots__ = ("scheme", "host", "port", "authority", "target", "userinfo", "tls", "text")

    def __init__(self, text):
        """ValueError if it is none."""
        if not isinstance(text, str):
            raise TypeError(f"url={text!r:.60}: give a str")
        found = _URL.fullmatch(text) if not _CONTROLS.search(text) else None
        if found is None:
            raise ValueError(f"{_shown(_shown_url('', text))} is no URL: http://host/path, without control characters")
        scheme, userinfo, host, port, path, query = found.groups()
        self.scheme, self.userinfo = scheme.lower(), userinfo
        if self.scheme not in _PORTS:
            raise ValueError(f"{_shown(_shown_url('', text))}: http and https are spoken here, not {scheme}")
        if found := _is_ambiguous(host):
            raise ValueError(f"{_shown(host)}: {found[0]!r} makes it one name by IDNA 2003 and another one by IDNA 2008; "
                             "give the one that is meant, as xn--…")
        try:
            host = (host if host.isascii() else host.encode("idna").decode()).lower()
        except UnicodeError as error:
            raise ValueError(f"{_shown(host)} is no name of a host: {error}") from None
        self.port = int(port) if port else _PORTS[self.scheme]
        self.authority = host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"
        if (problem := _authority_problem(f"{host}:{self.port}")) or not self.port:
            raise ValueError(f"{_shown(self.authority)} {problem or 'has port 0'}")
        self.host, self.tls = host.strip("[]"), self.scheme == "https"
        self.target = _ENCODED.sub(lambda found: urllib.parse.quote(found[0]), (path or "/") + (query or ""))
        self.text = f"{self.scheme}://{self.authority}{self.target}"

    @property
    def origin(self):
        return self.scheme, self.host, self.port

    @property
    def credentials(self):
        """(user, password) that it has, or None."""
        if not self.userinfo:
            return None
        user, _, password = self.userinfo.partition(":")
        return urllib.parse.unquote(user), urllib.parse.unquote(password)


def _pairs(given):
    """(name, value) of a mapping, or of what consists of them."""
    return given.items() if hasattr(given, "items") else given


def _fields(fields, what):
    """The (name, value) of params= or data=, a dict or pairs: of a list each item; None is "", True "true"."""
    if isinstance(fields, (str, bytes)):
        raise TypeError(f"{what}={fields!r:.60}: give a dict or pairs of names and values")
    return [(name, "" if value is None else str(value).lower() if isinstance(value, bool) else value)
            for name, values in _pairs(fields)
            for value in (values if isinstance(values, (list, tuple)) else [values])]


def _with_params(url, params):
    """`url` with more of a query."""
    query = _encode_urlencoded(_fields(params, "params")).decode()
    url, mark, fragment = url.partition("#")
    return (f"{url}{'' if url.endswith(('?', '&')) else '&' if '?' in url else '?'}{query}" if query else url) + mark + fragment


# -- authentication

class Auth:
    """What puts credentials into requests: BasicAuth, BearerAuth, DigestAuth, or a class of your own with these two methods."""

    def authorize(self, request):
        """Set what `request` (a ClientRequest) needs, in its headers, before it is sent."""

    def challenged(self, request, response):
        """After a 401: whether to try again, after another authorize(). Asked twice for one request at most."""
        return False

    def __repr__(self):
        return f"<{type(self).__name__}>"


class BasicAuth(Auth):
    """User and password with each request (RFC 7617). Over http anybody between can read them."""

    def __init__(self, user, password):
        self._value = _basic_credentials(user, password)

    def authorize(self, request):
        """Set Authorization."""
        request.headers.set("Authorization", self._value)


class BearerAuth(Auth):
    """A token with each request (RFC 6750)."""

    def __init__(self, token):
        self._value = _bearer_credentials(token)

    def authorize(self, request):
        """Set Authorization."""
        request.headers.set("Authorization", self._value)


class DigestAuth(Auth):
    """User and password, which are not sent, but prove that they are known (RFC 7616: MD5 and SHA-256, auth).

    The first request to an origin is answered with a challenge, and sent again; those after it answer that challenge at once.
    If the server asks for basic authentication, which would show it the password, the 401 is what you get.
    """

    def __init__(self, user, password):
        self._user, self._password = user, password
        self._challenges = {}           # origin -> [challenge, how often its nonce was used]

    def authorize(self, request):
        """Set Authorization, if the origin has asked for it before."""
        known = self._challenges.get(request.parsed.origin)
        if known is not None:
            known[1] += 1
            request.headers.set("Authorization", _digest_credentials(
                known[0], self._user, self._password, method=request.method, target=request.parsed.target,
                cnonce=secrets.token_hex(8), count=known[1]))

    def challenged(self, request, response):
        """Keep the challenge; True if it can be answered, and is not the refusal of an answer."""
        try:
            best = _best_challenge([one for value in response.headers.get_all("www-authenticate")
                                    for one in _parse_challenges(value)])
        except ProtocolError:
            return False
        if best is None or best.scheme != "digest":
            return False
        answered = "Authorization" in request.headers
        known = self._challenges.get(request.parsed.origin)
        if answered and known is not None and best.parameters.get("stale", "").lower() != "true" and (
                known[1] == 1 or best.parameters["nonce"] == known[0].parameters["nonce"]):
            return False                # the password is wrong
        if len(self._challenges) >= KEPT_ORIGINS:
            self._challenges.clear()
        self._challenges[request.parsed.origin] = [best, 0]
        return True


def _as_auth(auth):
    if auth is None or auth is False or isinstance(auth, Auth):
        return auth or None
    if isinstance(auth, tuple) and len(auth) == 2:
        return BasicAuth(*auth)
    raise TypeError(f"auth={type(auth).__name__}: give (user, password), BasicAuth, BearerAuth, DigestAuth or another Auth; "
                    "False for none")


def _read_netrc(path):
    """The netrc.netrc of a file, or None if there is none. ValueError for one that cannot be read."""
    try:
        return netrc.netrc(path)
    except FileNotFoundError:
        return None
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError) as error:
        raise ValueError(f"the netrc file {path!r} cannot be read: {error}; give netrc=False to do without") from error


# -- proxies

def _environment_proxies(environ):
    """{"http", "https", "all": URL; "no": what goes without}, of HTTP_PROXY … in either case; lower case counts first.

    HTTP_PROXY in upper case is what a CGI program gets for a `Proxy:` of its client, so it counts for nothing there (httpoxy).
    """
    found = {}
    for scheme in ("http", "https", "all", "no"):
        value = environ.get(f"{scheme}_proxy")
        if value is None and not (scheme == "http" and "REQUEST_METHOD" in environ):
            value = environ.get(f"{scheme}_proxy".upper())
        if value:
            found[scheme] = value
    return found


def _goes_without(url, no_proxy):
    """Whether NO_PROXY names it: *, a host (and all below it), host:port, an address, a network as 10.0.0.0/8."""
    try:
        address = ipaddress.ip_address(url.host)
    except ValueError:
        address = None
    for entry in no_proxy.lower().split(","):
        entry = entry.strip(" \t")
        if entry == "*":
            return True
        if address is not None:
            try:
                if address in ipaddress.ip_network(entry.strip("[]"), strict=False):
                    return True
            except ValueError:
                pass
        host, colon, port = entry.rpartition(":")
        if colon and _is_digits(port) and (":" not in host or host.endswith("]")):
            if int(port) != url.port:
                continue
            entry = host
        entry = entry.removeprefix("*").strip("[]").lstrip(".").removesuffix(".")
        if entry and (url.host.removesuffix(".") == entry or address is None and url.host.endswith("." + entry)):
            return True
    return False


class _Proxies:
    """Which proxy an origin is reached by."""

    def __init__(self, proxy, environ):
        if proxy is None:
            proxy = _environment_proxies(environ)
        elif isinstance(proxy, str):
            proxy = {"all": proxy}
        if unknown := proxy.keys() - {"http", "https", "all", "no"}:        # what was left out would go past the proxy
            raise ValueError(f"proxy: {sorted(unknown)} is none of \"http\", \"https\", \"all\" and \"no\"")
        self.no, self.all = proxy.get("no", ""), {}
        for scheme in proxy.keys() - {"no"}:
            text = proxy[scheme] if "://" in proxy[scheme] else "http://" + proxy[scheme]
            try:
                self.all[scheme] = _Url(text)
            except ValueError as error:
                raise ValueError(f"the proxy for {scheme}: {error}") from None
            if self.all[scheme].tls and scheme != "http":
                raise ValueError(f"the proxy {_shown_url('', text)} for {scheme}: TLS to a proxy is for http:// URLs alone "
                                 "({\"http\": …}); give http://")

    def find(self, url):
        proxy = self.all.get(url.scheme) or self.all.get("all")
        return None if proxy is None or self.no and _goes_without(url, self.no) else proxy


# -- cookies

class _CookiePolicy(http.cookiejar.DefaultCookiePolicy):
    """What RFC 6265 (and 6265bis for Secure and the prefixes of names) says, and http.cookiejar, which is older, does not."""

    def __init__(self):
        # A cookie without Domain is for its host alone, not for those below it (RFC 6265 5.4). There is no list of public
        # suffixes here: co.uk and its like are known to http.cookiejar, github.io is a domain as any other.
        super().__init__(strict_domain=True, strict_ns_domain=self.DomainStrictNonDomain)

    def set_ok(self, cookie, request):
        host, domain = request.origin_req_host, cookie.domain.lstrip(".")
        if cookie.domain_specified and domain != host and ("." not in domain or not _is_name(host)):
            return False        # of a top level, as which http.cookiejar takes `local`; an address is in no domain (5.1.3)
        prefix = cookie.name[:9].lower()
        secure, own = prefix.startswith(("__secure-", "__host-")), prefix.startswith("__host-")
        if (secure and not cookie.secure or own and (cookie.domain_specified or cookie.path != "/")
                or cookie.secure and request.type != "https"):
            return False
        return super().set_ok(cookie, request)


def _is_name(host):
    """Whether it is no address."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return True
    return False


class _Jar(http.cookiejar.CookieJar):
    """A jar that does not grow without end. `filled`: whether there may be anything in it."""

    def __init__(self):
        super().__init__(_CookiePolicy())
        self.filled, self._added = False, 0

    def set_cookie(self, cookie):
        """Of too many of a domain the oldest go; of too many in all those of the domain with the most."""
        self.filled = True
        self._added += 1
        super().set_cookie(cookie)
        if self._added < MAX_OF_DOMAIN // 2:            # so that counting costs little for each
            return
        self._added = 0
        self.clear_expired_cookies()
        domains = {}
        for cookie in self:
            domains.setdefault(cookie.domain, []).append(cookie)
        for domain, cookies in domains.items():
            for cookie in cookies[:-MAX_OF_DOMAIN]:
                self.clear(domain, cookie.path, cookie.name)
        if sum(map(len, domains.values())) > MAX_JAR:
            self.clear(max(domains, key=lambda domain: len(domains[domain])))


class _CookieRequest:
    """A request as http.cookiejar wants it."""

    unverifiable = False

    def __init__(self, url):
        self._url, self.host, self.type, self.origin_req_host = url, url.authority, url.scheme, url.host
        self.cookie = None

    def get_full_url(self):
        return self._url.text

    def has_header(self, name):
        return False

    def get_header(self, name, default=None):
        return default

    def header_items(self):
        return []

    def add_unredirected_header(self, name, value):
        if name == "Cookie":
            self.cookie = value


class _CookieResponse:
    """A response as http.cookiejar wants it."""

    def __init__(self, headers):
        self._headers = headers

    def info(self):
        return self

    def get_all(self, name, default=None):
        return [value for value in self._headers.get_all(name) if self._is_short(value)] or default

    @staticmethod
    def _is_short(value):
        pair, *attributes = value.split(";")
        return len(pair) <= MAX_COOKIE and all(len(attribute) <= MAX_COOKIE_ATTRIBUTE for attribute in attributes)


# -- contents to send

class _Streamed:
    """A content that is sent in pieces: bytes, files, iterables and async iterables of bytes, one after the other.

    `length`: bytes, None if that is not known. `again`: whether it can be sent another time; `shared`: and at the same time.
    `begun`: whether sending it has begun.
    """

    __slots__ = ("length", "again", "shared", "begun", "_sources")

    def __init__(self, sources, length=None):
        self._sources = []              # (source, where a file began)
        self.again, self.shared, self.begun, self.length = True, True, False, length
        for source in sources:
            start = _place(source)
            self._sources.append((source, start))
            self.again &= isinstance(source, bytes) or start is not None
            self.shared &= isinstance(source, bytes)

    def rewind(self):
        for source, start in self._sources:
            if start is not None:
                source.seek(start)

    async def pieces(self):
        self.begun = True
        for source, _ in self._sources:
            if isinstance(source, bytes):
                for at in range(0, len(source), UPLOAD_PIECE):
                    yield source[at:at + UPLOAD_PIECE]
            elif _is_file(source):
                while piece := await _read_piece(source):
                    yield piece
            elif hasattr(source, "__aiter__"):
                async for piece in source:
                    yield piece.encode() if isinstance(piece, str) else piece
            else:
                for piece in source:
                    yield piece.encode() if isinstance(piece, str) else piece


async def _read_piece(file):
    """Of a file of the disk in a thread, which may wait for the disk."""
    if isinstance(file, io.BytesIO):
        piece = file.read(UPLOAD_PIECE)
    else:
        piece = await flowcoro.to_thread(file.read, UPLOAD_PIECE)
        if inspect.isawaitable(piece):
            piece = await piece
    if isinstance(piece, str):
        raise TypeError(f"{file!r} gives text: open the file in binary mode")
    return piece


def _is_file(source):
    """A response can be read too, but is iterated, as what comes in pieces."""
    return hasattr(source, "read") and not isinstance(source, Response)


def _place(source):
    """Where a file is, if it can go back there, else None."""
    try:
        return source.tell() if _is_file(source) and source.seekable() else None
    except (AttributeError, OSError, TypeError):
        return None


def _size_left(file):
    """Bytes from where a file is to its end, or None."""
    place = _place(file)
    if place is None:
        return None
    try:
        end = file.seek(0, 2)
        file.seek(place)
    except OSError:
        return None
    return max(0, end - place)


def _file_part(name, file):
    """files=: a file, bytes, or (filename, file[, media type]), as a _FormPart."""
    filename, media_type = None, None
    if isinstance(file, tuple):
        if not 2 <= len(file) <= 3:
            raise TypeError(f"files: {name!r}: give a file, or (filename, file), or (filename, file, media type)")
        filename, file, *rest = file
        media_type = rest[0] if rest else None
    if filename is None:
        its_own = getattr(file, "name", None)
        filename = os.path.basename(its_own) if isinstance(its_own, str) else "upload"
    if media_type is None:
        media_type = mimetypes.guess_type(filename)[0]
    if isinstance(file, (str, bytes, bytearray, memoryview)):
        return _FormPart(name, file, filename, media_type)
    if hasattr(file, "keys") or not any(hasattr(file, verb) for verb in ("read", "__aiter__", "__iter__")):
        raise TypeError(f"files: {name!r}: {type(file).__name__} is no file and no bytes")
    return _FormPart(name, file, filename, media_type, _size_left(file) if _is_file(file) else None)


def _content_of(content, data, files, value):
    """The content of a request: None, bytes or a _Streamed; and its media type or None. `value`: of json=."""
    if (content is not None) + (data is not None or files is not None) + (value is not None) > 1:
        raise TypeError("a request has one content: content=, json=, or data= and files=")
    if value is not None:
        return flowcoro_schema.encode_json(value).encode(), _JSON
    if files is not None:
        parts = [_FormPart(name, value if isinstance(value, (str, bytes)) else str(value))
                 for name, value in _fields(data or (), "data")]
        parts += [_file_part(name, file) for name, file in _pairs(files)]
        body = _MultipartBody(parts)
        return _Streamed(body, body.length), body.content_type
    if data is not None:
        if isinstance(data, (str, bytes)):
            raise TypeError("data= takes the fields of a form, a dict or pairs; for text or bytes as they are use content=")
        return _encode_urlencoded(_fields(data, "data")), "application/x-www-form-urlencoded"
    if content is None or isinstance(content, bytes):
        return content, None
    if isinstance(content, str):
        return content.encode(), _TEXT
    if isinstance(content, (bytearray, memoryview)):
        return bytes(content), None
    if _is_file(content):
        return _Streamed([content], _size_left(content)), None
    if hasattr(content, "keys"):                # an iterable too: of its names
        raise TypeError(f"content={content!r:.60} is no content: json= sends it as JSON, data= as the fields of a form")
    if hasattr(content, "__aiter__") or hasattr(content, "__iter__"):
        return _Streamed([content]), None
    raise TypeError(f"content={content!r:.60}: give bytes, str, a file, or an iterable or async iterable of bytes")


class ClientRequest:
    """What HttpClient sends: `method`, `url` (without user and password), `headers` (Headers, to be changed by hooks and Auth
    until it is sent), `content` (None, bytes, or something that is sent in pieces), `parsed` (its URL, taken apart)."""

    __slots__ = ("method", "parsed", "content", "_headers", "_equipped")

    def __init__(self, method, parsed, headers, content=None):
        self.method, self.parsed, self.content, self._headers = method, parsed, content, headers
        self._equipped = ()             # names of the headers that depend on where it goes

    @property
    def url(self):
        """The URL, str."""
        return self.parsed.text

    @property
    def headers(self):
        """Headers."""
        if type(self._headers) is not Headers:          # of a request whose head was made before
            self._headers = Headers(self._headers)
        return self._headers

    @property
    def _again(self):
        """Whether it can be sent another time."""
        return self.content is None or isinstance(self.content, bytes) or self.content.again

    def _rewind(self):
        if isinstance(self.content, _Streamed):
            self.content.rewind()

    def __repr__(self):
        return f"<ClientRequest {self.method} {self.url}>"


class ClientResponse(Response):
    """What HttpClient returns. `content` is there at once, but for stream(): then iterate the response, or read() it.

    status, reason, version; headers; request (the last one), url (its); elapsed (seconds from its begin to the end of this head);
    history (the responses before: redirects, challenges); trailers (Headers, or None; whoever wants them sends `TE: trailers`);
    content (bytes, decoded; None: not read).
    """

    __slots__ = ("status", "reason", "version", "headers", "request", "elapsed", "history", "trailers", "content",
                 "_exchange", "_decoder", "_pieces", "_begun")

    def __init__(self, head, request, elapsed):
        self.status, self.reason, self.version, self.headers = head.status, head.reason, head.version, head.headers
        self.request, self.elapsed, self.history, self.trailers, self.content = request, elapsed, (), None, None
        self._exchange = self._decoder = self._pieces = None
        self._begun = False             # some of the content was given away, and is not kept

    @property
    def url(self):
        """The URL that it came from, str."""
        return self.request.parsed.text

    @property
    def text(self):
        """The content as str, by the charset that Content-Type names, else UTF-8; what does not decode becomes U+FFFD."""
        try:
            media_type = self.media_type
            charset = media_type.charset() if media_type else "utf-8"
        except ProtocolError:           # malformed, or not known
            charset = "utf-8"
        return self._whole().decode(charset, "replace")

    def json(self):
        """The value of the content, which is JSON. ResponseError if it is none (that is, for a network it is an error)."""
        content = self._whole()
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise self._bad(f"the content is no JSON: {str(error)[:100] or 'too deep'}") from None

    @property
    def links(self):
        """{relation, or target without one: {"url": absolute, "rel": …, and its other parameters}} of Link (RFC 8288)."""
        links = {}
        for value in self.headers.get_all("link"):
            try:
                found = parse_links(value)
            except ProtocolError:       # no reason to lose the others
                continue
            for target, parameters in found:
                url = urllib.parse.urljoin(self.url, target)
                for relation in parameters.get("rel", "").lower().split() or [url]:
                    links.setdefault(relation, {**parameters, "url": url})
        return links

    @property
    def cookies(self):
        """{name: value} that this response sets. What is kept of them, and for whom, is in the client's `cookies`."""
        pairs = [value.partition(";")[0].partition("=") for value in self.headers.get_all("set-cookie")]
        return {name.strip(" \t"): value.strip(" \t") for name, equals, value in pairs if equals}

    def raise_for_status(self):
        """The response itself, if its status is below 400; else StatusError."""
        if self.status < 400:
            return self
        error = StatusError(f"{self.request.method} {self.url}: {self.status} {self.reason}".rstrip())
        error.retry_after = self.retry_after
        raise _with(error, self.request, self)

    @property
    def retry_after(self):
        """Seconds after which the server wants to be asked again, by Retry-After, 0 for a date that has passed; None if it does
        not say, or nothing that makes sense. RFC 9110 10.2.3."""
        value = self.headers.get("retry-after")
        if value is None:
            return None
        try:
            return _parse_retry_after(value, time.time())
        except ProtocolError:
            return None

    # -- the content in pieces

    def __aiter__(self):
        """Decoded pieces as they come. TransferError, ResponseError, RequestTimeout. Cancelled: the connection is closed."""
        if self.content is not None:
            self._pieces = iter([self.content] if self.content else [])
        return self

    async def __anext__(self):
        while True:
            try:
                piece = next(self._pieces, None) if self._pieces is not None else None
                if piece is not None:
                    self._begun = True
                    return piece
                exchange = self._exchange
                if exchange is None:
                    raise StopAsyncIteration
                if exchange.connection is None:
                    raise flowcoro.ClosedError(f"{self!r} was closed, or has failed, before its content was read")
                data = await exchange.more(self)
                if data:
                    self._pieces = self._decoder.decode(data) if self._decoder else iter([data])
                else:
                    self._exchange = None
                    if self._decoder:
                        self._decoder.finish()
            except ProtocolError as error:
                self._drop()
                raise self._bad(error.message) from error

    async def read(self):
        """All of the content, which is kept in `content`. Errors as for a piece; ResponseError beyond max_bytes of the client;
        RuntimeError if some of it has been iterated."""
        if self.content is None:
            if self._begun:
                raise RuntimeError(f"{self!r}: some of its content was given in pieces already, and not kept; read() it instead")
            content, most = bytearray(), self._exchange.options.max_bytes if self._exchange else math.inf
            async for piece in self:
                content += piece
                if len(content) > most:
                    self._drop()
                    raise self._bad(f"a content of more than max_bytes={most}; iterate the response, or allow more")
            self.content = bytes(content)
        return self.content

    async def lines(self, limit=MAX_LINE):
        """Iterate the lines of the text (UTF-8), without their ends (LF, CR LF). ResponseError for more than `limit` bytes."""
        def text(line):
            if len(line) > limit:
                self._drop()
                raise self._bad(f"a line of more than {limit} bytes (limit); iterate the response for pieces")
            return line.decode("utf-8", "replace")

        rest = bytearray()
        async for piece in self:
            rest += piece
            if b"\n" in piece:
                *lines, rest = rest.split(b"\n")
                for line in lines:
                    yield text(line.removesuffix(b"\r"))
            if len(rest) > limit + 1:               # (one may be the CR of its end)
                text(rest)
        if rest:
            yield text(rest)

    async def close(self):
        """Give the connection back: to be used again, if all has come; else it is closed. Nothing, if that was done before."""
        if self._exchange is not None and self._exchange.connection is not None:
            self._exchange.leave()

    async def _skip(self):
        """Read what is left of a response that nobody is interested in, if that is little, and comes soon."""
        exchange, left = self._exchange, MAX_DROPPED
        with contextlib.suppress(RequestError), flowcoro.move_on_after(DROP_TIMEOUT):
            while left > 0 and self.content is None and exchange.connection is not None:
                data = await exchange.more(self)
                left -= len(data) or left
        self.content = self.content or b""
        await self.close()

    def _drop(self):
        if self._exchange is not None:
            self._exchange.drop()

    def _whole(self):
        if self.content is None:
            raise RuntimeError(f"{self!r}: its content was not read; `await response.read()` first, instead of iterating it")
        return self.content

    def _bad(self, message):
        return _with(ResponseError(f"{self.request.method} {self.url}: {message}"), self.request, self)

    def __repr__(self):
        return f"<ClientResponse {self.status} {self.reason}>"


# -- one exchange

class _ClientConnection:
    """A connection to an origin, or to a proxy on the way there."""

    __slots__ = ("sock", "codec", "used", "heard", "__weakref__")

    def __init__(self, sock, limits):
        self.sock, self.codec = sock, HttpConnection("client", **limits)
        self.used = self.heard = False          # there was an exchange; there was a byte of this one's answer

    def is_quiet(self):
        """K2. Whether nothing has come since the last exchange."""
        sock = self.sock
        try:
            sock.raw.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return sock.tls is None or not sock.statistics()["bytes_buffered"]
        except OSError:
            pass
        return False

    async def receive(self):
        """The next event but NEED_DATA."""
        codec = self.codec
        while (event := codec.next_event()) is NEED_DATA:
            data = await self.sock.read(RECEIVED_PIECE)
            if data:
                codec.receive_data(data)
            else:
                codec.receive_end()
        return event

    async def receive_head(self):
        """The ResponseHead; the informational ones before it are skipped. Nothing of it has been received (K2)."""
        codec, sock, informed, event = self.codec, self.sock, 0, NEED_DATA
        while True:
            if event is NEED_DATA:
                data = await sock.read(RECEIVED_PIECE)
                if data:
                    codec.receive_data(data)
                    self.heard = True
                else:
                    codec.receive_end()
            elif type(event) is ResponseHead:
                return event
            elif type(event) is not InformationalResponse:          # PAUSED: after a 101
                raise ProtocolError(502, f"{event!r:.60} where a response has to be")
            else:
                informed += 1
                if informed > MAX_INFORMATIONAL:
                    raise ProtocolError(502, f"more than {MAX_INFORMATIONAL} informational responses before the response")
            event = codec.next_event()

    def close(self):
        self.sock.close_nowait()


class _Origin:
    """How one origin is reached: its proxy and its pool."""

    def __init__(self, client, url):
        self.client, self.url, self.proxy = client, url, client._proxies.find(url)
        self.absolute = self.proxy is not None and not url.tls          # the proxy is asked for URLs
        self.pool = flowcoro_net.ConnectionPool(
            self.connect, max_connections=client._max_connections, idle_timeout=client._keep_alive, acquire_timeout=None,
            reusable=lambda connection, error: error is None)

    @property
    def proxy_authorization(self):
        credentials = self.proxy.credentials
        return [("Proxy-Authorization", _basic_credentials(*credentials))] if credentials else []

    async def connect(self):
        client, url, proxy = self.client, self.url, self.proxy
        if proxy is None:
            return _ClientConnection(await client._connect(url.host, url.port, client._tls if url.tls else None), client._limits)
        sock = await client._connect(proxy.host, proxy.port, client._tls if proxy.tls else None)
        if url.tls:
            try:
                await self.tunnel(sock)
                await sock.start_tls(client._tls, server_name=url.host)
            except BaseException:
                sock.close_nowait()
                raise
        return _ClientConnection(sock, client._limits)

    async def tunnel(self, sock):
        """Have the proxy connect (RFC 9110 9.3.6)."""
        connection, host = _ClientConnection(sock, self.client._limits), self.url.host
        target = f"{f'[{host}]' if ':' in host else host}:{self.url.port}"
        head = RequestHead("CONNECT", target, [("Host", target), *self.proxy_authorization])
        await sock.write(connection.codec.send_message(head))
        said = f"the proxy {self.proxy.authority} does not connect to {target}"
        try:
            response = await connection.receive_head()
        except ProtocolError as error:
            raise ProxyError(f"{said}: {error.message}") from error
        if response.status >= 300 or connection.codec.trailing_data:
            error = ProxyError(f"{said}: it answers {response.status} {response.reason}".rstrip())
            error.status = response.status
            raise error


class _ClientExchange:
    """One request and its response on one connection."""

    __slots__ = ("request", "origin", "options", "deadline", "phase", "scope", "connection", "head", "done")

    def __init__(self, request, origin, options, deadline, head=None):
        self.request, self.origin, self.options, self.deadline = request, origin, options, deadline
        self.head = head                # the bytes of all of it, made before
        self.connection = self.phase = self.scope = None
        self.done = 0                   # bytes of content received, for progress=

    async def run(self, stream):
        """The ClientResponse; with `stream` its content is still to come, on this exchange's connection."""
        limits, pool, fresh = self.options.timeouts, self.origin.pool, False
        while True:
            connection = await self.acquire(fresh)
            began = flowcoro.now()
            self.phase = "head"
            self.scope = scope = flowcoro.CancelScope(deadline=min(self.deadline, began + limits.head))
            with scope:
                try:
                    head = await self.send(connection, math.inf if stream else self.options.max_bytes)
                    if head is None:
                        head = await connection.receive_head()
                    response = ClientResponse(head, self.request, flowcoro.now() - began)
                    if stream:
                        self.connection, response._exchange = connection, self
                        response._decoder = self.decoder(head.headers, math.inf)
                    else:
                        await self.receive_content(connection, response)
                        self.give_back(connection)
                    return response
                except BaseException as error:
                    self.connection = None
                    pool.discard(connection)
                    if not fresh and connection.used and not connection.heard and self.may_repeat(error):
                        fresh = True
                        self.request._rewind()
                        continue
                    if failure := self.failure(error, connection):
                        raise failure from error
                    raise
            raise self.late()

    def wait(self, phase, seconds):
        """K3."""
        self.phase = phase
        self.scope.deadline = min(self.deadline, flowcoro.now() + seconds)

    async def acquire(self, fresh):
        """A connection; with `fresh` a new one. Its limits are kept by the pool, where it is that something takes time."""
        pool, seconds = self.origin.pool, self.options.timeouts.connect
        if self.deadline != math.inf:
            seconds = min(seconds, max(0.0, self.deadline - flowcoro.now()))
        while True:
            try:
                connection = await pool.acquire(timeout=seconds)
            except RequestError as error:
                raise _with(error, self.request)
            except TimeoutError as error:
                self.phase = "connect"
                raise self.late(f": {error}") from error
            except OSError as error:
                raise _with(ConnectError(f"{self.said}: {error.strerror or error}"), self.request) from error
            if not connection.used or not fresh and connection.is_quiet():
                return connection
            pool.discard(connection)

    async def send(self, connection, max_bytes):
        """None; or the ResponseHead, if it was received meanwhile."""
        codec, request = connection.codec, self.request
        codec.max_body, connection.heard = max_bytes if max_bytes != math.inf else None, False
        if self.head is not None:
            codec.note_message(request.method)
            await connection.sock.write(self.head)
            return None
        content = request.content
        target = request.url if self.origin.absolute else request.parsed.target
        head = RequestHead(request.method, target, request.headers.items())
        if type(content) is _Streamed or content and len(content) > WHOLE_REQUEST:
            return await self.send_and_listen(connection, head, content)
        await connection.sock.write(codec.send_message(head, content or b""))
        return None

    async def send_and_listen(self, connection, head, content):
        """The ResponseHead. One of 300 and more that comes before all of the content was sent ends that: the server does not want
        the rest, and may not even read it (RFC 9112 9.3). The connection is not used again then, as the codec knows."""
        sending, outcome, failure = flowcoro.CancelScope(), None, None

        async def listen():
            nonlocal outcome
            try:
                outcome = await connection.receive_head()
            except Exception as error:
                outcome = error
            if type(outcome) is not ResponseHead or outcome.status >= 300:
                sending.cancel()

        async with flowcoro.TaskGroup() as group:
            group.spawn(listen(), name="hear an early answer")
            try:
                with sending:
                    await self.send_pieces(connection, head, content)
            except Exception as error:          # of what the content comes from; out of the group it would be one of several
                failure = error
                group.cancel()
            self.wait("head", self.options.timeouts.head)
        if failure is not None or type(outcome) is not ResponseHead:
            raise failure or outcome
        return outcome

    async def send_pieces(self, connection, head, content):
        codec, limits, progress = connection.codec, self.options.timeouts, self.options.upload_progress
        content = content if type(content) is _Streamed else _Streamed([content], len(content))
        framing = ("Transfer-Encoding", "chunked") if content.length is None else ("Content-Length", str(content.length))
        head.headers.append(framing)
        self.wait("read", limits.read)
        done, goes_on = 0, await self.write(connection, codec.send(head))
        async with contextlib.aclosing(content.pieces()) as pieces:
            async for piece in pieces:
                self.wait("read", limits.read)
                goes_on = goes_on and await self.write(connection, codec.send(Data(piece)))
                if not goes_on:
                    break
                done += len(piece)
                if progress is not None:
                    progress(done, content.length)
        if goes_on and (end := codec.send(EndOfMessage())):
            await self.write(connection, end)

    @staticmethod
    async def write(connection, data):
        """False if the connection is broken: who refuses a content before all of it has come may have answered before that."""
        try:
            await connection.sock.write(data)
        except flowcoro_net.BrokenError:
            return False
        return True

    async def receive_content(self, connection, response):
        """All of it, within the scope of the exchange."""
        codec, options, content = connection.codec, self.options, b""
        if "content-encoding" in response.headers._index:
            response._decoder = self.decoder(response.headers, options.max_bytes)
        decoder = response._decoder
        while True:
            event = codec.next_event()
            if type(event) is Data:
                data = event.data
                if options.progress is not None:
                    self.tell(response, data)
                if decoder is not None:
                    data = await _inflated(decoder, data)
                if not content:
                    content = data
                    continue
                if type(content) is bytes:          # so that many small pieces take no more memory than a large one
                    content = bytearray(content)
                content += data
            elif event is NEED_DATA:
                self.wait("read", options.timeouts.read)
                data = await connection.sock.read(RECEIVED_PIECE)
                if data:
                    codec.receive_data(data)
                else:
                    codec.receive_end()
            else:
                break
        if decoder is not None:
            decoder.finish()
        response.trailers, response.content = event.trailers, bytes(content)

    async def more(self, response):
        """The next piece of the content as it came, for a response of stream(); b"" at the end, and the connection is given back.

        Cancelled, or by an error, the connection is closed.
        """
        connection, scope = self.connection, flowcoro.move_on_after(self.options.timeouts.read)
        self.phase, self.deadline = "read", math.inf
        with scope:
            try:
                event = await connection.receive()
                if type(event) is Data:
                    if self.options.progress is not None:
                        self.tell(response, event.data)
                    return event.data
            except BaseException as error:
                self.drop()
                if failure := self.failure(error, connection):
                    raise _with(failure, self.request, response) from error
                raise
            response.trailers, self.connection = event.trailers, None
            self.give_back(connection)
            return b""
        raise _with(self.late(), self.request, response)

    def tell(self, response, data):
        self.done += len(data)
        length = response.headers.get("content-length")
        self.options.progress(self.done, length and int(length))

    def decoder(self, headers, max_bytes):
        """A _Decoder, or None where there is nothing to decode, or nothing that is known here."""
        if "content-encoding" not in headers or not self.origin.client._decode:
            return None
        try:
            return _Decoder(headers._combined("content-encoding"), max_bytes=max_bytes)
        except ProtocolError as error:
            if error.status == 415:
                return None
            raise

    # -- the connection's way back (K1)

    def give_back(self, connection):
        codec = connection.codec
        if codec.reusable and codec._start == len(codec._buffer):
            codec.start_next_cycle()
            connection.used = True
            self.origin.pool.release(connection)
        else:
            self.origin.pool.discard(connection)

    def drop(self):
        connection, self.connection = self.connection, None
        if connection is not None:
            self.origin.pool.discard(connection)

    def leave(self):
        """Give it back if what is left of the response has been received already."""
        connection, self.connection = self.connection, None
        try:
            while type(connection.codec.next_event()) is Data:
                pass
        except ProtocolError:
            pass
        self.give_back(connection)

    # -- errors

    @property
    def said(self):
        return f"{self.request.method} {self.request.url}"

    def may_repeat(self, error):
        """K2: of an exchange that has ended before any answer."""
        return (isinstance(error, (ProtocolError, flowcoro_net.NetworkError)) and self.request.method in _IDEMPOTENT
                and self.request._again)

    def failure(self, error, connection):
        """What the caller gets for an error of the network or the codec; None for others, which are its own."""
        if isinstance(error, ProtocolError):
            of_codec = connection.codec._error == (error.status, error.message)
            kind = TransferError if connection.codec._ended and of_codec else ResponseError
            return _with(kind(f"{self.said}: {error.message}"), self.request)
        if isinstance(error, flowcoro_net.NetworkError):
            return _with(TransferError(f"{self.said}: {error.strerror}"), self.request)
        return None

    def late(self, why=""):
        """The RequestTimeout for the phase in which the time was up."""
        limits, phase = self.options.timeouts, "total" if flowcoro.now() >= self.deadline else self.phase
        at = {"connect": "connecting", "head": "waiting for the head of the response", "read": "waiting for more of the content"}
        seconds = getattr(limits, phase)
        error = RequestTimeout(f"{self.said}: timeout {phase}={seconds:g} s has passed while {at[self.phase]}{why}")
        error.phase = phase
        if self.phase == "connect":
            error.sent = False
        return _with(error, self.request)


async def _inflated(decoder, data):
    """All that a piece gives, with a checkpoint for each MiB."""
    out = bytearray()
    for number, piece in enumerate(decoder.decode(data), 1):
        out += piece
        if not number % INFLATED_A_TURN:
            await flowcoro.checkpoint()
    return bytes(out)


# -- the client

class _Options(typing.NamedTuple):
    """What one request is made with."""

    timeouts: Timeouts
    follow: bool
    auth: Auth | None
    cookies: dict
    retries: Retries
    max_bytes: float
    policy: object
    progress: object = None
    upload_progress: object = None


class _Given(typing.NamedTuple):
    """What a request was given instead of the client's options."""

    auth: object
    timeout: object
    follow: object
    retries: object
    max_bytes: object
    policy: object
    progress: object
    upload_progress: object

    def options(self, own):
        """_Options: the client's `own` but for what was given."""
        return _Options(
            own.timeouts if self.timeout is _CLIENTS else _as_timeouts(self.timeout, Timeouts().total),
            own.follow if self.follow is _CLIENTS else bool(self.follow),
            own.auth if self.auth is _CLIENTS else _as_auth(self.auth), own.cookies,
            own.retries if self.retries is _CLIENTS else _as_retries(self.retries),
            own.max_bytes if self.max_bytes is _CLIENTS else _as_limit(self.max_bytes),
            own.policy if self.policy is _CLIENTS else _as_policy(self.policy),
            self.progress, self.upload_progress)


_ALL_CLIENTS, _NO_CONTENT = _Given(*[_CLIENTS] * 6, None, None), (None, None, None, None)


def _as_retries(retries):
    if not isinstance(retries, Retries):
        retries = Retries(retries)
    if isinstance(retries.count, bool) or not isinstance(retries.count, int) or retries.count < 0:
        raise ValueError(f"retries={retries.count!r}: give a number of times, 0 for none, or Retries")
    return retries


def _as_limit(max_bytes):
    if max_bytes is None:
        return math.inf
    if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 0:
        raise ValueError(f"max_bytes={max_bytes!r}: give a number of bytes, or None for no limit")
    return max_bytes


def _as_policy(policy):
    if policy is not None and (isinstance(policy, type) or not callable(getattr(policy, "try_execute", None))):
        raise TypeError(f"policy={policy!r:.80}: give a policy of flowcoro_resilience, or what has `await try_execute(operation, "
                        "*args)`; not its class; None for none")
    return policy


def _client_tls(verify, cert):
    """What verify= and cert= mean for connect(): True, or an ssl.SSLContext."""
    if isinstance(verify, ssl.SSLContext):
        if cert is not None:
            raise ValueError("verify= is an ssl.SSLContext: load the certificate of cert= into that")
        return verify
    if verify is True and cert is None:
        return True
    certificate, key, password = ((cert if isinstance(cert, tuple) else (cert,)) + (None, None))[:3]
    return flowcoro_net.client_tls(ca=None if isinstance(verify, bool) else verify, certificate=certificate, key=key,
                                   password=password, verify=verify is not False)


async def _connect(host, port, tls):
    return await flowcoro_net.Socket.connect(host, port, tls=tls)


async def _connect_unix(path, host, port, tls):
    return await flowcoro_net.Socket.connect_unix(path, tls=tls, server_name=host if tls else None)


class _Ordinary(typing.NamedTuple):
    """An ordinary request that was made before."""

    url: _Url
    origin: _Origin
    pairs: tuple
    head: bytes


_DEFAULT_HEADERS = (("User-Agent", f"flowcoro/{__version__}"), ("Accept", "*/*"), ("Accept-Encoding", "gzip, deflate"))
_has_scheme = re.compile(r"[A-Za-z][0-9A-Za-z+.-]*://").match
_REDIRECTS = frozenset([301, 302, 303, 307, 308])

# What speaks of a content that a redirect has taken away; and what is not for another origin (K4).
_OF_CONTENT = ("content-type", "content-length", "content-encoding", "content-language", "content-location", "transfer-encoding",
               "digest", "content-digest", "last-modified")
_OF_ORIGIN = ("authorization", "cookie", "proxy-authorization", "host", "origin")


def _origin_text(origin):
    scheme, host, port = origin
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


class _Operation:
    """A request as a policy sees it: each call makes one exchange, and several may be under way at a time. `key`: the origin, as
    "https://host:port"; `idempotent`: whether it can be sent again, and that does no harm."""

    __slots__ = ("key", "idempotent", "_client", "_request", "_rest", "_known", "_deadline", "_scope", "_begun", "_running",
                 "_failure")

    discard = staticmethod(ClientResponse.close)        # of a response which nobody gets: with stream() it has a connection

    def __init__(self, client, request, options, stream, deadline, known):
        self._client, self._request, self._rest, self._known = client, request, (options, stream, deadline), known
        self.key = _origin_text(request.parsed.origin)
        self.idempotent = request.method in _IDEMPOTENT and request._again
        # For what the policy does in between, as waiting for the next attempt. An exchange keeps the deadline by itself: its
        # RequestTimeout is something that policies count, and to be cancelled is not.
        self._deadline, self._scope = deadline, flowcoro.CancelScope(deadline=deadline)
        self._begun, self._running, self._failure = False, 0, None

    async def run(self):
        """The ClientResponse that the policy lets us have."""
        request, options = self._request, self._rest[0]
        with self._scope:
            response = await options.policy.try_execute(self, request)
            if not isinstance(response, ClientResponse):
                raise TypeError(f"{request!r}: its policy gave {response!r:.80} instead of a ClientResponse: what has something "
                                "else to give stands around the request, as fallback.try_execute(client.get, url)")
            return response
        if self._failure is not None:
            raise self._failure
        error = RequestTimeout(f"{request.method} {request.url}: timeout total={options.timeouts.total:g} s has passed while its "
                               f"policy {options.policy!r:.80} let it wait")
        error.phase, error.sent = "total", None if self._begun else False
        raise _with(error, request)

    async def __call__(self, request):
        known = self._known
        if self._begun:
            request, known = self._again(), None
        self._begun = True
        self._count(1)
        try:
            return await self._client._once(request, *self._rest, known)
        except RequestError as error:
            self._failure = error
            raise
        finally:
            self._count(-1)

    @flowcoro.atomic
    def _count(self, change):
        """How many exchanges are under way, by more workers than one."""
        self._running += change
        self._scope.deadline = math.inf if self._running else self._deadline

    def _again(self):
        """The request once more. RequestError if its content has gone."""
        request, why = self._request, None
        if isinstance(content := request.content, _Streamed):
            if content.begun and not content.again:
                why = "and what its content came from can be read once; give bytes, or a file that can seek"
            elif self._running and not content.shared:
                why = "and what its content comes from is being read for an attempt that is under way; give bytes"
        if why is not None:
            raise _with(RequestError(f"{request.method} {request.url}: its policy wants to send it once more, {why}"),
                        request) from self._failure
        request = _again(request)
        request._rewind()
        return request


class _Sending:
    """From a ClientRequest to its ClientResponse. HttpClient is what users see of it."""

    def _origin(self, url):
        key = url.origin
        origin = self._origins.get(key)
        if origin is None:
            if self._closed:
                raise flowcoro.ClosedError("this HttpClient is closed")
            if len(self._origins) >= KEPT_ORIGINS:
                self._forget_origin()
            origin = self._origins[key] = _Origin(self, url)
        return origin

    def _forget_origin(self):
        """The oldest that is not in use: whoever has, or waits for, a connection to another one brings it back to this client."""
        for key, origin in list(self._origins.items()):
            numbers = origin.pool.statistics()
            if not (numbers["in_use"] or numbers["waiting"] or numbers["connecting"]):
                self._origins.pop(key, None)
                origin.pool.clear()
                self._known.clear()
                return

    def _equip(self, request, options):
        """Set what depends on where it goes: Host, cookies, credentials; not what the caller has set."""
        headers, url, equipped = request.headers, request.parsed, []
        if "host" not in headers:
            headers._entries.insert(0, _entry("Host", url.authority))
            headers._index = None
            equipped.append("host")
        if "cookie" not in headers:
            pairs = [_cookie_pair(name, value) for name, value in options.cookies.items()]
            if getattr(self.cookies, "filled", True):
                asked = _CookieRequest(url)
                self.cookies.add_cookie_header(asked)
                pairs += [asked.cookie] if asked.cookie else []
            if pairs:
                headers.set("Cookie", "; ".join(pairs))
                equipped.append("cookie")
        if options.auth is not None and "authorization" not in headers:
            before = set(headers._entries)
            options.auth.authorize(request)
            equipped += {"authorization", *[entry[0] for entry in request.headers._entries if entry not in before]}
        request._equipped = equipped

    async def _follow(self, request, options, stream, known=None, response=None):
        """The final response, after redirects and challenges; `response`: the first one, if it is there."""
        deadline = flowcoro.now() + options.timeouts.total
        history, challenges, original = [], 0, request
        while True:
            if response is None:
                response = await self._attempts(request, options, stream, deadline, known)
            status, known = response.status, None
            if "set-cookie" in response.headers:
                self.cookies.extract_cookies(_CookieResponse(response.headers), _CookieRequest(request.parsed))
            if self._response_hooks:
                await self._call_hooks(self._response_hooks, response, response)
            if history:
                response.history = tuple(history)
            if status == 401 and options.auth is not None and challenges < 2 and request._again and (
                    options.auth.challenged(request, response)):
                challenges += 1
                following = _again(request)
            elif status in _REDIRECTS and options.follow and "location" in response.headers:
                try:
                    if len(history) >= self._max_redirects:
                        raise RedirectError(f"{original.method} {original.url}: more than max_redirects={self._max_redirects}")
                    following, options = self._redirected(request, response, options)
                except RedirectError as error:
                    await response.close()
                    raise _with(error, request, response) from None
            else:
                return response
            if stream:
                await response._skip()
            history.append(response)
            request, response = following, None
            request._rewind()

    def _redirected(self, request, response, options):
        """(ClientRequest, _Options) of where a response leads. RedirectError."""
        location = response.headers["location"]
        try:
            location = location.encode("latin-1").decode()      # what is not ASCII should be encoded; if not, it is UTF-8
        except UnicodeDecodeError:
            pass
        try:
            url = _Url(location if _has_scheme(location) else urllib.parse.urljoin(request.url, location))
        except ValueError as error:
            raise RedirectError(f"{request.method} {request.url}: a redirect that cannot be followed: {error}") from None
        following = _again(request)
        headers, method, content, status = following.headers, request.method, request.content, response.status
        if status == 303 and method != "HEAD" or status in (301, 302) and method == "POST":
            method, content = "GET", None
            for name in _OF_CONTENT:
                headers.remove(name)
        elif not request._again:
            raise RedirectError(f"{method} {request.url}: a redirect to {url.text} wants the content once more, and what it came "
                                "from can be read once; give bytes, or a file that can seek")
        if url.origin != request.parsed.origin:
            for name in _OF_ORIGIN:
                headers.remove(name)
            options = options._replace(auth=None, cookies={})
        return ClientRequest(method, url, headers, content), options

    async def _attempts(self, request, options, stream, deadline, known):
        """One response, perhaps after retries."""
        retries, number = options.retries, 0
        while True:
            try:
                if options.policy is None:
                    response = await self._once(request, options, stream, deadline, known)
                else:
                    response = await _Operation(self, request, options, stream, deadline, known).run()
                if response.status not in retries.statuses or not retries.count:
                    if self._budget < retries.budget:
                        # (rounded, since ten times 0.1 is less than 1)
                        self._budget = min(retries.budget, round(self._budget + RETRY_GIVEN_BACK, 6))
                    return response
                error, safe = None, request.method in _IDEMPOTENT
            except RequestError as failure:
                error, response = failure, None
                safe = self._may_retry(request, failure)
            wait = retries.wait * 2**number * (0.5 + random.random() / 2)
            if response is not None and (asked := response.retry_after) is not None:
                wait = asked
            if (not safe or number >= retries.count or not request._again or self._budget < 1 or wait > retries.max_wait
                    or flowcoro.now() + wait >= deadline):
                if error is not None:
                    raise error
                return response
            self._budget -= 1
            number += 1
            if stream and response is not None:
                await response._skip()
            await flowcoro.sleep(wait)
            request, known = _again(request), None
            request._rewind()

    @staticmethod
    def _may_retry(request, error):
        """Whether another try may succeed, and does no harm."""
        if isinstance(error, ConnectError):
            return not isinstance(error, ProxyError) and not isinstance(error.__cause__, flowcoro_net.TlsError)
        if isinstance(error, RequestTimeout):
            return error.phase == "connect" or error.phase != "total" and request.method in _IDEMPOTENT
        return isinstance(error, TransferError) and request.method in _IDEMPOTENT

    async def _once(self, request, options, stream, deadline, known):
        if known is not None:
            return await _ClientExchange(request, known.origin, options, deadline, known.head).run(stream)
        self._equip(request, options)
        if self._request_hooks:
            await self._call_hooks(self._request_hooks, request, None)
        origin = self._origin(request.parsed)
        if origin.absolute:
            for name, value in origin.proxy_authorization:
                request.headers.set(name, value)
        return await _ClientExchange(request, origin, options, deadline).run(stream)

    async def _call_hooks(self, hooks, thing, response):
        """A hook's error ends the request, and gives the connection of its response back."""
        try:
            for hook in hooks:
                result = hook(thing)
                if inspect.isawaitable(result):
                    await result
        except BaseException:
            if response is not None:
                await response.close()
            raise


def _again(request):
    """The same request, without what _equip() has set."""
    headers = request.headers.copy()
    for name in request._equipped:
        headers.remove(name)
    return ClientRequest(request.method, request.parsed, headers, request.content)


class HttpClient(_Sending):
    """A client: `async with HttpClient() as client: response = await client.get("http://…")`. Connections are kept and reused.

    base_url: what comes before URLs that begin with no scheme. headers: of all requests, besides User-Agent, Accept and
    Accept-Encoding; the attribute `headers` may be changed. params: of all URLs. cookies: dict, of all requests; what servers set
    is kept in the attribute `cookies`, an http.cookiejar.CookieJar, which you may give instead.
    auth: (user, password) or an Auth. timeout: Timeouts, or seconds for connect, head and each read. retries: a number, or
    Retries. follow_redirects, max_redirects. max_bytes: of content, decoded, that is held in memory; None: no limit. proxy: URL,
    or {"http": URL, "https": URL, "no": "host,.domain,10.0.0.0/8"}; None: HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY of the
    environment; {}: none. netrc: path of a file with users and passwords for hosts; None: $NETRC, or ~/.netrc; False: none.
    trust_env=False: neither environment nor netrc, unless given here. verify: whether servers must have a certificate for their
    name; a path of certificates to trust instead of the system's; or an ssl.SSLContext. cert: one's own, a path or (certificate,
    key) or (certificate, key, password). event_hooks: {"request": [function], "response": [function]}, plain or async; called
    with each ClientRequest before it is sent, each ClientResponse after it has come, those of redirects too; what they raise ends
    the request. decode=False: contents stay as compressed as they come. max_connections: to one origin. keep_alive: seconds for
    which an idle connection is kept. max_head: bytes of a response's head. connect: async function (host, port, tls) that returns
    a connected Socket; unix: path of a Unix socket, for all URLs.

    policy: of flowcoro_resilience, say, or what else has `await try_execute(operation, request)`; it stands around each exchange,
    inside redirects, authentication and retries=. The operation has `key`, its origin ("https://host:port"), `idempotent`
    (whether its method is, and its content can be sent again) and `discard`, and is called with the ClientRequest as often as
    the policy wants, which has `retry_after` of responses and `sent` of errors to go by; a status is no error to it. It must give
    a ClientResponse. What it waits counts for timeout's `total`.

    All of it serves any number of tasks at once, in one run. Errors: RequestError and what is below it, what a policy raises
    (Rejected) as it is, TypeError and ValueError for arguments that make no sense, LocalProtocolError for what cannot be sent,
    flowcoro.ClosedError after close(). Cancelled anywhere the connection in use is closed, and an unknown part of the request was
    sent. Sources: RFC 9110, 9112, 6265, 7616, 7617.
    """

    def __init__(self, *, base_url="", headers=(), params=None, cookies=None, auth=None, timeout=Timeouts(), retries=0,
                 follow_redirects=True, max_redirects=MAX_REDIRECTS, max_bytes=MAX_INFLATED, proxy=None, netrc=None,
                 trust_env=True, verify=True, cert=None, event_hooks=None, decode=True,
                 max_connections=CONNECTIONS_PER_ORIGIN, keep_alive=KEPT_IDLE, max_head=MAX_HEAD, connect=None, unix=None,
                 policy=None):
        self._base = None
        if base_url:
            base = _Url(base_url)
            self._base = base.text.partition("?")[0]
            if base.userinfo:
                self._base = self._base.replace("://", f"://{base.userinfo}@", 1)
        self._params = params
        self.headers = Headers(_DEFAULT_HEADERS)
        for name, value in _pairs(headers or ()):
            self.headers.set(name, value)
        own = {} if cookies is None or isinstance(cookies, http.cookiejar.CookieJar) else dict(cookies)
        self.cookies = cookies if isinstance(cookies, http.cookiejar.CookieJar) else _Jar()
        self._max_redirects, self._max_connections, self._keep_alive = max_redirects, max_connections, keep_alive
        self._limits = {"max_head": max_head, "max_field_line": max_head, "max_request_line": max_head}
        self._proxies = _Proxies({} if proxy is None and not trust_env else proxy, os.environ)
        self._netrc_file, self._netrc, self._netrc_asked = netrc, _CLIENTS, netrc is not None
        if netrc is None:
            self._netrc_file = os.environ.get("NETRC") or os.path.expanduser("~/.netrc") if trust_env else False
        self._tls, self._decode = _client_tls(verify, cert), bool(decode)
        hooks = event_hooks or {}
        if hooks.keys() - {"request", "response"}:
            raise ValueError(f"event_hooks={event_hooks!r}: there are \"request\" and \"response\"")
        self._request_hooks, self._response_hooks = list(hooks.get("request", ())), list(hooks.get("response", ()))
        if connect is not None and unix is not None:
            raise ValueError("connect= and unix= both say how to connect: give one")
        self._connect = connect or (_connect if unix is None else functools.partial(_connect_unix, unix))
        self._options = _Options(_as_timeouts(timeout, Timeouts().total), bool(follow_redirects), _as_auth(auth), own,
                                 _as_retries(retries), _as_limit(max_bytes), _as_policy(policy))
        self._budget = self._options.retries.budget
        self._is_plain = not self._options.retries.count and policy is None         # one attempt, and nothing around it
        self._origins, self._urls, self._known = {}, {}, {}
        self._known_headers, self._headers_count = None, 0
        self._closed, self._around = False, None        # around: entered before, left after (test_client())

    # -- requests

    def get(self, url, **options):
        """await it: request("GET", …)."""
        return self._ordinary("GET", url) if not options else self.request("GET", url, **options)

    def head(self, url, **options):
        """await it: request("HEAD", …)."""
        return self._ordinary("HEAD", url) if not options else self.request("HEAD", url, **options)

    def options(self, url, **options):
        """await it: request("OPTIONS", …)."""
        return self.request("OPTIONS", url, **options)

    def delete(self, url, **options):
        """await it: request("DELETE", …)."""
        return self.request("DELETE", url, **options)

    def post(self, url, **options):
        """await it: request("POST", …)."""
        return self.request("POST", url, **options)

    def put(self, url, **options):
        """await it: request("PUT", …)."""
        return self.request("PUT", url, **options)

    def patch(self, url, **options):
        """await it: request("PATCH", …)."""
        return self.request("PATCH", url, **options)

    async def request(self, method, url, *, params=None, headers=(), cookies=None, content=None, json=None, data=None, files=None,
                      auth=_CLIENTS, timeout=_CLIENTS, follow_redirects=_CLIENTS, retries=_CLIENTS, max_bytes=_CLIENTS,
                      policy=_CLIENTS, progress=None, upload_progress=None):
        """A ClientResponse with all of its content, whatever its status.

        params: dict or pairs to add to the query; of a list each item; None is "". headers: dict or pairs, in place of those of
        the client. cookies: dict. content: bytes, str (UTF-8), a file (sent from where it is; binary), an iterable or async
        iterable of bytes. json: a value. data: fields of a form, as params. files: {name: file, bytes, or (filename, file[, media
        type])}, sent with data as multipart/form-data. auth=False: none. timeout, follow_redirects, retries, max_bytes, policy:
        in place of the client's; policy=None: none.
        progress, upload_progress: function (bytes so far, bytes in all or None), of the content as it travels. Errors, and what
        cancellation leaves: see HttpClient.
        """
        request, options = self._build(method, url, params, headers, cookies, (content, data, files, json), _Given(
            auth, timeout, follow_redirects, retries, max_bytes, policy, progress, upload_progress))
        return await self._follow(request, options, False)

    @contextlib.asynccontextmanager
    async def stream(self, method, url, *, params=None, headers=(), cookies=None, content=None, json=None, data=None, files=None,
                     auth=_CLIENTS, timeout=_CLIENTS, follow_redirects=_CLIENTS, retries=_CLIENTS, max_bytes=_CLIENTS,
                     policy=_CLIENTS, progress=None, upload_progress=None):
        """`async with client.stream("GET", url) as response:`, and in it `async for piece in response:`. Otherwise as request().

        At the end of the block the connection is used again if all of the content has been read, else closed.
        """
        request, options = self._build(method, url, params, headers, cookies, (content, data, files, json), _Given(
            auth, timeout, follow_redirects, retries, max_bytes, policy, progress, upload_progress))
        response = await self._follow(request, options, True)
        try:
            yield response
        finally:
            await response.close()

    def events(self, url, *, method="GET", last_event_id="", reconnect=True, max_event=MAX_EVENT, **options):
        """`async with client.events(url) as events:`, and in it `async for event in events:`. An EventStream.

        reconnect: connect again when the connection ends, with Last-Event-ID; False: then the iteration ends. max_event: bytes.
        options: as request()'s; a timeout of None, or Timeouts with a long `read`, for servers that are silent for long.
        """
        return EventStream(self, method, url, last_event_id, reconnect, max_event, options)

    # -- making a request

    def _parse(self, url):
        parsed = self._urls.get(url)
        if parsed is None:
            parsed = _Url(url if self._base is None or not isinstance(url, str) or _has_scheme(url) else self._below(url))
            if len(self._urls) >= KNOWN_URLS:
                self._urls.clear()
            if len(url) <= KNOWN_URL:
                self._urls[url] = parsed
        return parsed

    def _below(self, url):
        """`url` after base_url, whose path stays before it."""
        base = self._base
        return base + url if url[:1] in ("", "?", "#") else base.rstrip("/") + "/" + url.removeprefix("/")

    async def _ordinary(self, method, url):
        """A request with nothing of its own. From the third time on the bytes of its head are there already."""
        headers = self.headers._entries
        if self._known_headers is not headers or self._headers_count != len(headers):
            self._known.clear()
            self._known_headers, self._headers_count = headers, len(headers)
        known, options = self._known.get((method, url)), self._options
        if known is None or getattr(self.cookies, "filled", True) or self._request_hooks:
            seen = url in self._urls
            request, options = self._build(method, url, None, (), None, _NO_CONTENT, _ALL_CLIENTS)
            response = await self._follow(request, options, False)
            if seen and options is self._options and response.request is request and request._equipped == ["host"]:
                self._remember(method, url, request)
            return response
        request = ClientRequest(method, known.url, known.pairs)
        request._equipped = ("host",)
        if not self._is_plain:
            return await self._follow(request, options, False, known)
        # What _follow(), _attempts() and _once() come to when there is nothing for them to do: 2 µs less of 25.
        deadline = flowcoro.now() + options.timeouts.total
        response = await _ClientExchange(request, known.origin, options, deadline, known.head).run(False)
        if response.status < 300 and "set-cookie" not in response.headers._index and not self._response_hooks:
            return response
        return await self._follow(request, options, False, None, response)

    def _remember(self, method, url, request):
        origin, pairs = self._origins.get(request.parsed.origin), request.headers.items()
        if origin is None or len(url) > KNOWN_URL:      # None: it was closed meanwhile
            return
        codec = HttpConnection("client")
        head = codec.send_message(RequestHead(method, request.url if origin.absolute else request.parsed.target, pairs))
        if codec.keep_alive and not codec.upgrade:
            if len(self._known) >= KNOWN_URLS:
                self._known.clear()
            self._known[method, url] = _Ordinary(request.parsed, origin, tuple(pairs), head)

    def _build(self, method, url, params, headers, cookies, contents, given):
        """(ClientRequest, _Options) of what request() was given."""
        if not isinstance(method, str) or method == "CONNECT" or not _is_token(method):
            raise ValueError(f"method={method!r}: give a token as GET; CONNECT is for proxies, see proxy=")
        options = self._options if given is _ALL_CLIENTS else given.options(self._options)
        if cookies:
            options = options._replace(cookies={**options.cookies, **cookies})
        for more in (self._params, params):
            if more:
                url = _with_params(url, more)
        parsed = self._parse(url)
        content, media_type = _content_of(*contents)
        headers = list(_pairs(headers or ()))
        if options.auth is None and given.auth is not False and (auth := self._credentials(parsed)):
            options = options._replace(auth=auth)
        all_headers = self.headers.copy()
        for name, _ in headers:
            all_headers.remove(name)
        for name, value in headers:
            all_headers.add(name, value)
        if media_type is not None and "content-type" not in all_headers:
            all_headers.set("Content-Type", media_type)
        for name in ("content-length", "transfer-encoding"):
            if name in all_headers:
                raise ValueError(f"the header {name} is set by the content; leave it out")
        return ClientRequest(method, parsed, all_headers, content), options

    def _credentials(self, url):
        """The Auth of a URL's user, or of netrc."""
        found = url.credentials
        if found is None and self._netrc_file:
            if self._netrc is _CLIENTS:
                try:
                    self._netrc = _read_netrc(self._netrc_file)
                except ValueError as error:
                    if self._netrc_asked:
                        raise
                    self._netrc = None              # nobody has asked for it: it is told once, and done without
                    flowcoro.report_error(error, "requests are made without it", "flowcoro_http")
            entry = self._netrc and self._netrc.authenticators(url.host)
            found = entry and (entry[0], entry[2])
        return BasicAuth(*found) if found else None

    # -- closing

    def statistics(self):
        """{"http://host:port": statistics() of its ConnectionPool} of the origins there are connections to, or were."""
        return {_origin_text(key): origin.pool.statistics() for key, origin in self._origins.items()}

    async def close(self):
        """Close all connections, those in use too. Twice is once. Cancelled: they are closed."""
        self._closed = True
        origins, self._origins = self._origins, {}
        self._known.clear()
        for origin in origins.values():
            origin.pool.close_nowait()
        await flowcoro.checkpoint()

    async def __aenter__(self):
        if self._around is not None:
            await self._around.__aenter__()
        return self

    async def __aexit__(self, kind, error, trace):
        try:
            await self.close()
        finally:
            if self._around is not None:
                await self._around.__aexit__(kind, error, trace)


# -- server-sent events

class _EventParser:
    """Bytes of an event stream to events (WHATWG HTML 9.2.6). `id`: the last one; `retry`: milliseconds, None if not named."""

    def __init__(self, max_event, last_event_id=""):
        self._max, self.id, self.retry = max_event, last_event_id, None
        self._line, self._after_cr, self._first = bytearray(), False, True
        self._data, self._size, self._event = [], 0, ""

    def receive_data(self, data):
        """-> the events that are complete by it, a list. ProtocolError for one of more than max_event bytes."""
        events = []
        if self._after_cr:
            data, self._after_cr = data.removeprefix(b"\n"), not data
        *lines, rest = re.split(rb"\r\n|\r|\n", data)
        self._after_cr = self._after_cr or data.endswith(b"\r")
        for line in lines:
            self._line += line
            self._take(self._line.decode("utf-8", "replace"), events)
            self._line.clear()
        self._line += rest
        if self._size + len(self._line) > self._max:
            raise ProtocolError(502, f"an event of more than max_event={self._max} bytes")
        return events

    def _take(self, line, events):
        if self._first:
            line, self._first = line.removeprefix("\ufeff"), False
        if not line:
            if self._data:
                events.append(ServerSentEvent("\n".join(self._data), self._event or "message", self.id))
            self._data, self._size, self._event = [], 0, ""
            return
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
            self._size += len(value) + 1
            if self._size > self._max:
                raise ProtocolError(502, f"an event of more than max_event={self._max} bytes")
        elif name == "event":
            self._event = value
        elif name == "id" and "\0" not in value:
            self.id = value
        elif name == "retry" and re.fullmatch(r"[0-9]{1,9}", value):
            self.retry = int(value)


class EventStream:
    """The events of a server, across connections: see HttpClient.events(). Use it by `async with`, and in that by `async for`.

    When a connection ends or breaks it connects again, after `retry` seconds (3, or what the server names; more with each failure
    in a row, a minute at most), with Last-Event-ID. A 204 ends the iteration. Raised are errors of the first connection, those
    that connecting again does not mend (StatusError for 4xx but 408 and 429; ResponseError for what is no event stream), and the
    last of ten failures in a row, to which a policy's Rejected counts. `response`: the current one, or None; `last_event_id`: of
    the last event.
    """

    def __init__(self, client, method, url, last_event_id, reconnect, max_event, options):
        self._client, self._method, self._url, self._options = client, method, url, options
        self._reconnect, self._max = reconnect, max_event
        self.last_event_id, self.retry, self.response = last_event_id, EVENT_RETRY, None
        self._events, self._failures, self._over = collections.deque(), 0, False
        self._context = self._parser = None

    async def __aenter__(self):
        await self._open()
        return self

    async def __aexit__(self, kind, error, trace):
        await self._leave()
        self._over = True

    def __aiter__(self):
        return self

    async def __anext__(self):
        while not self._events:
            if self._over:
                raise StopAsyncIteration
            try:
                if self._context is None:
                    await self._open()
                    continue
                data = await anext(self.response, None)
                if data is not None:
                    self._take(data)
                    continue
                error = None
            except flowcoro.FlowCoroError as failure:       # a policy's too
                error = failure
            await self._leave()
            if not self._reconnect or error is not None and not self._may_mend(error):
                self._over = True
                if error is not None:
                    raise error
                continue
            self._failures += 1
            if self._failures > MAX_EVENT_FAILURES:
                self._over = True
                said = f"{self._method} {self._url}: the event stream ended {self._failures} times in a row without an event"
                raise error or TransferError(said)
            await flowcoro.sleep(min(MAX_EVENT_RETRY, self.retry * 2**(self._failures - 1)))
        event = self._events.popleft()
        self.last_event_id, self._failures = event.id, 0
        return event

    @staticmethod
    def _may_mend(error):
        if isinstance(error, StatusError):
            return error.response.status >= 500 or error.response.status in (408, 429)
        return isinstance(error, (ConnectError, TransferError, RequestTimeout)) or getattr(error, "sent", None) is False

    async def _open(self):
        headers = dict(self._options.get("headers", {})) | {"Accept": "text/event-stream", "Cache-Control": "no-store"}
        value = self.last_event_id.encode().decode("latin-1")
        if value and _is_text(value):           # a header cannot say all that an id can be
            headers["Last-Event-ID"] = value
        context = self._client.stream(self._method, self._url, **{**self._options, "headers": headers})
        response = await context.__aenter__()
        self._context, self.response = context, response
        self._parser = _EventParser(self._max, self.last_event_id)
        if response.status == 204:
            self._over = True
        try:
            if response.status not in (200, 204):
                response.raise_for_status()
            if not self._over and (response.status != 200 or _essence(response.headers) != "text/event-stream"):
                raise response._bad(f"{response.status}, {response.headers.get('content-type')} is no event stream")
        except BaseException:
            await self._leave()
            raise

    def _take(self, data):
        try:
            self._events.extend(self._parser.receive_data(data))
        except ProtocolError as error:
            raise self.response._bad(error.message) from None
        self.last_event_id = self.last_event_id if self._events else self._parser.id
        if self._parser.retry is not None:
            self.retry = self._parser.retry / 1000

    async def _leave(self):
        context, self._context, self.response = self._context, None, None
        if context is not None:
            await context.__aexit__(None, None, None)


# -- a client of an app in the same process

class _InMemory:
    """What test_client() stands on: connections are socket pairs, whose other ends the app serves."""

    def __init__(self, app):
        self._app, self._stack, self._group, self._run = app, None, None, None

    async def __aenter__(self):
        async with contextlib.AsyncExitStack() as stack:
            self._run = _Run(self._app)
            await stack.enter_async_context(self._run.running())
            self._group = await stack.enter_async_context(flowcoro.TaskGroup())
            self._stack = stack.pop_all()

    async def __aexit__(self, kind, error, trace):
        self._group.cancel()            # what is still at work; the client is closed
        self._group = None
        await self._stack.aclose()

    async def connect(self, host, port, tls):
        if self._group is None:
            raise RuntimeError("the app runs while the client is open: `async with app.test_client() as client:`")
        here, there = socket.socketpair()
        self._group.spawn(self._serve(flowcoro_net.Socket(there), "http" if tls is None else "https"))
        return flowcoro_net.Socket(here)

    async def _serve(self, sock, scheme):
        async with sock:
            await self._run.serve(sock, scheme)


class _TestClient(HttpClient):
    """An HttpClient that has its app in the same process."""

    async def socket(self):
        """Another connection to the app, a flowcoro_net.Socket: flowcoro_websocket.connect("ws://testserver/…", socket=…)."""
        return await self._around.connect("testserver", 80, None)


def _test_client(app, **options):
    """HttpServer.test_client(): an HttpClient of `app`, which runs while the client is open; nothing listens. TLS is left out."""
    inside = _InMemory(app)
    client = _TestClient(**{"base_url": "http://testserver", "trust_env": False, "connect": inside.connect, **options})
    client._around = inside
    return client


# ---- hosting: WSGI --------------------------------------------------------------------------------------------
#
# A WSGI application blocks, so it runs in a thread, and nothing else does: all that has to do with the connection happens in the
# task of the request. The two meet in a _WsgiCall. What the thread has to say it leaves there, and rings; when it needs something
# (the next piece of the request's content, room for more of the answer), it asks, and waits for the answer.
#
#     W1  a field of a _WsgiCall is written by one side only; what both change are a deque and a SimpleQueue, whose operations
#         are atomic. The thread changes the fields first and rings then; the task looks at them and parks, in one atomic step
#     W2  each question of the thread gets one answer; when the task is gone (the client is, or the server stops) the answer is an
#         error, and so is that to each later one: a thread never waits for somebody who is not there
#     W3  while calls are waiting, either a thread looks for one (it has the token), or all threads are at work
#
# A change of threads costs as much as the rest of a request. So a call makes one round where it can: content of the request that
# is small is read before, and an answer that is complete at once goes back whole. And rounds are shared: a call does not wake a
# thread itself, but has a task do it that comes after all others that are ready now; the thread works through all that are
# waiting, and rings once; it is heard when it has finished, or lets go of the GIL. A thread that takes a call while more are
# waiting wakes one other, which comes to run as soon as this one blocks. Measured, hello with 64 connections, µs of processor
# time per request, of which 16 are the server's own: 43 with one to_thread() for each request, 41 if
# each wakes a thread at once, 30 with this.
#
# Rejected: one to_thread() for a batch, which comes back when all of it is done: a slow call would hold back the quick ones that
# came before it.

# Threads of an application at most: as many as to_thread() has. They mostly wait for a database.
WSGI_THREADS = 40

# Bytes of a request's content that are read before the application is called, which so needs no second round; and bytes of an
# answer that may wait for the client, before the application has to. One read of a socket.
WSGI_READ_BEFORE = WSGI_AHEAD = 64 * 2**10

# Seconds after which a thread ends that has had nothing to do: as those of to_thread().
WSGI_IDLE = 10.0

# What a thread asks for.
_INPUT, _ROOM = "the next piece of the content", "room for more of the answer"
_SOFTWARE = f"FlowCoro/{__version__}"
_WSGI_STATUS = re.compile(rf"([2-9][0-9][0-9]) ([{_VALUE_CHARS}]*)")


@_known
def _environ_key(name):
    """What a field is called in an environ. "" for those that are left out: X_Y would pass for X-Y, which a proxy may have set;
    and HTTP_PROXY is taken for a setting (CVE-2016-5385)."""
    key = name.upper().replace("-", "_")
    if "_" in name or key == "PROXY":
        return ""
    return key if key in ("CONTENT_TYPE", "CONTENT_LENGTH") else "HTTP_" + key


@_known
def _wsgi_status(text):
    """(status, reason or None for the usual one) of what an application calls its status."""
    if not isinstance(text, str):
        raise TypeError(f"start_response() takes the status as a str such as \"200 OK\", got {text!r:.80}")
    found = _WSGI_STATUS.fullmatch(text)
    if found is None:
        raise ValueError(f"start_response() takes three digits, a space and a reason, such as \"200 OK\", got {text!r:.80}")
    status = int(found[1])
    usual = http.HTTPStatus(status).phrase if status in http.HTTPStatus._value2member_map_ else ""
    return status, None if found[2] == usual else found[2]


def _wsgi_environ(request, rest, content):
    """The environ of PEP 3333. `rest`: the decoded path below the mount, or None: all of it."""
    path = request.path
    script, rest = ("", path) if rest is None else (path[:len(path) - len(rest)], rest)
    if "%" in request.raw_path:             # bytes as latin-1, as PEP 3333 has it for all texts
        script, rest = script.encode().decode("latin-1"), rest.encode().decode("latin-1")
    name, port = request.server if type(request.server) is tuple else ("localhost", "")         # else a Unix socket
    address, client_port = request.client if type(request.client) is tuple else ("", "")
    environ = {
        "REQUEST_METHOD": request.method, "SCRIPT_NAME": "" if script == "/" else script, "PATH_INFO": rest,
        "QUERY_STRING": request.query_string, "REQUEST_URI": request.target, "SERVER_NAME": name, "SERVER_PORT": str(port or 80),
        "SERVER_PROTOCOL": "HTTP/" + request.version, "SERVER_SOFTWARE": _SOFTWARE, "REMOTE_ADDR": address,
        "REMOTE_PORT": str(client_port), "wsgi.version": (1, 0), "wsgi.url_scheme": request.scheme, "wsgi.input": content,
        "wsgi.input_terminated": True, "wsgi.errors": sys.stderr, "wsgi.multithread": True, "wsgi.multiprocess": True,
        "wsgi.run_once": False, "wsgi.file_wrapper": _WsgiFile,
    }
    for field, value in request.headers.items():
        key = _environ_key(field)
        if key in environ:
            environ[key] += ("; " if key == "HTTP_COOKIE" else ",") + value
        elif key:
            environ[key] = value
    return environ


class _WsgiFile:
    """wsgi.file_wrapper: a file in blocks; not of 8 KiB, which most ask for, since each is a step of a thread."""

    def __init__(self, file, block_size=WSGI_AHEAD):
        self.file, self.block_size = file, max(block_size, WSGI_AHEAD)
        self.close = getattr(file, "close", None) or (lambda: None)

    def __iter__(self):
        return iter(functools.partial(self.file.read, self.block_size), b"")

    def for_sendfile(self):
        """(file, offset, bytes) if it is one that the system can send, else None. The system sees what is behind the descriptor,
        and a GzipFile, say, has one too, of something else: so it is only for files that are nothing but their bytes.
        """
        file = self.file.file if type(self.file) is tempfile._TemporaryFileWrapper else self.file
        if type(file) not in (io.BufferedReader, io.BufferedRandom, io.FileIO):
            return None
        if type(getattr(file, "raw", file)) is not io.FileIO:
            return None
        try:
            found = os.fstat(self.file.fileno())
            offset = self.file.tell()
        except (AttributeError, OSError, ValueError):
            return None
        return (self.file, offset, max(0, found.st_size - offset)) if stat.S_ISREG(found.st_mode) else None


class _WsgiInput(io.RawIOBase):
    """A request's content, as a thread reads it from the connection; what is buffered stands in a BufferedReader before it."""

    def __init__(self, call):
        self.call, self.piece = call, b""

    def readable(self):
        return True

    def readinto(self, buffer):
        if not self.piece:
            self.piece = memoryview(self.call.ask(_INPUT))
        count = min(len(buffer), len(self.piece))
        buffer[:count], self.piece = self.piece[:count], self.piece[count:]
        return count


class _WsgiCall:
    """A request at an application: what its thread and its task have to tell each other."""

    __slots__ = ("threads", "application", "environ", "context", "is_head", "head", "file", "blocks", "pushed", "asked", "error",
                 "ended", "request", "chunks", "task", "taken", "gone", "answers")

    def __init__(self, threads, application, request):
        self.threads, self.application, self.request = threads, application, request
        self.context, self.is_head = contextvars.copy_context(), request.method == "HEAD"
        # the thread's:
        self.head = None            # (status, reason or None, Headers) that start_response() was given
        self.file = None            # that is the whole answer: (file, offset, bytes)
        self.blocks = collections.deque()       # of the answer; the task takes them out
        self.pushed = 0             # bytes that were ever put there; not 0: the head may be on its way
        self.asked = None           # _INPUT or _ROOM, and it waits for the answer; the task resets it
        self.error, self.ended = None, False
        # the task's:
        self.chunks = None          # the request's content, once it is asked for
        self.task = None            # that is parked here
        self.taken = 0              # bytes of the blocks
        self.gone = False           # nobody wants the answer any more
        self.answers = queue.SimpleQueue()

    # -- in the thread

    def run(self):
        try:
            self.context.run(self._run)
        except BaseException as error:
            self.error = error
            if self.gone and not isinstance(error, ConnectionAbortedError):
                flowcoro.report_error(error, f"{self!r}: it failed after its client was gone", "flowcoro_http")
        self.environ = self.context = None      # which may lead back here
        self.ended = True
        if self.gone:
            self._close_file()
        self.threads.ring(self)

    def _run(self):
        result = self.application(self.environ, self.start_response)
        try:
            if type(result) in (list, tuple):
                self._push(result[0] if len(result) == 1 else b"".join(result))
            elif type(result) is _WsgiFile and not self.pushed and not self.is_head and (found := result.for_sendfile()):
                self.file, result = found, None         # which the task closes
            else:
                for block in result:
                    self.write(block)
                    if self.gone or self.is_head and self.pushed:
                        break
        finally:
            if hasattr(result, "close"):
                result.close()
        if self.head is None:
            raise RuntimeError(f"{self!r}: it returned without a call of start_response()")

    def start_response(self, status, headers, exc_info=None):
        """PEP 3333. Returns write()."""
        if exc_info:
            try:
                if self.pushed:
                    raise exc_info[1].with_traceback(exc_info[2])
            finally:
                exc_info = None     # no circle through the traceback
        elif self.head is not None:
            raise RuntimeError("start_response() was called already; to replace the head by one of an error, give exc_info")
        status, reason = _wsgi_status(status)
        headers = Headers(headers)
        for name, _ in headers:
            if name.lower() in _HOP_BY_HOP:
                raise ValueError(f"start_response(): {name} is for the server to set, which knows the connection")
        self.head = status, reason, headers
        return self.write

    def _push(self, block):
        if not isinstance(block, bytes):
            raise TypeError(f"an answer consists of bytes, got {block!r:.80}")
        if self.head is None:
            raise RuntimeError("there is content before start_response() was called")
        if block:
            self.blocks.append(block)
            self.pushed += len(block)

    def write(self, block):
        """Have a block of the answer sent, and wait while too much is on its way. ConnectionAbortedError: the client is gone."""
        self._push(block)
        if self.is_head:
            self.blocks.clear()         # and how long all of it would be is not known
        elif not block:
            return
        elif self.pushed - self.taken > WSGI_AHEAD:
            self.ask(_ROOM)
        else:
            self.threads.ring(self)

    def ask(self, what):
        """Wait for what only the task can do; its result or its error. ConnectionAbortedError: it is gone."""
        if self.ended:
            raise ConnectionAbortedError(errno.ECONNABORTED, f"{self!r}: the call of the application is over")
        self.asked = what
        self.threads.ring(self)
        answer = self.answers.get()
        if not isinstance(answer, BaseException):
            return answer
        if self.gone:
            self.answers.put(answer)        # for the next question
        raise answer

    # -- in the task

    async def answer(self):
        """The Response. Errors of the application leave as they are."""
        self.threads.submit(self)
        await self._news()
        if self.error is not None:
            raise self._failure()
        status, reason, headers = self.head
        response = _response_of(status, headers, None)
        response.reason = reason
        if self.file is not None:
            file, offset, count = self.file
            response.stream = _FileStream(file, offset, min(count, int(headers.get("content-length", count))))
            self.file = None
        elif self.ended and (self.blocks or not self.is_head):
            response.content = b"".join(self.blocks)
        else:
            response.stream = _WsgiStream(self)
        return response

    def _failure(self):
        if isinstance(self.error, Exception):
            return self.error
        failure = RuntimeError(f"{self!r}: it raised {type(self.error).__name__}")      # which would end the run
        failure.__cause__ = self.error
        return failure

    async def _news(self):
        """Wait for a block (HEAD: there is none), or the end; what the thread needs of the request meanwhile is brought."""
        while not (self.ended or self.blocks and not self.is_head):
            if self.asked is _INPUT:
                self.asked = None
                self.answers.put(await self._next_chunk())
            elif self.asked is _ROOM:
                self.asked = None
                self.answers.put(None)
            else:
                await flowcoro.park(self._park)

    async def _next_chunk(self):
        if self.chunks is None:
            self.chunks = self.request.stream()
        try:
            return await anext(self.chunks, b"")
        except Exception as error:          # 413, what is no HTTP, a connection that broke: the application's read() raises it
            return error

    def _park(self, task):
        if self.ended or self.blocks and not self.is_head or self.asked:
            flowcoro.reschedule(task)
            return
        task.park_reason = "wait for a WSGI application"
        task.abort_function = self._abort
        self.task = task

    def _abort(self, task):
        self.task = None
        return True

    @flowcoro.atomic
    def wake(self):
        task, self.task = self.task, None
        if task is not None:
            flowcoro.reschedule(task)

    def fail(self, error):
        """There is no thread for it."""
        self.error, self.ended = error, True
        self.wake()

    def leave(self):
        """Nobody wants the rest: the thread ends when it next looks, or asks."""
        if not self.gone:
            self.gone = True
            self.answers.put(ConnectionAbortedError(errno.ECONNABORTED, "the client is gone, or the server stops"))
            if self.ended:
                self._close_file()

    def _close_file(self):
        """Nobody sends it. Either side may come last; both see that, and may both close it."""
        if self.file is not None:
            self.file[0].close()

    def __repr__(self):
        return f"<{self.request.method} {_shown(self.request.target)} at {_shown_handler(self.application)}>"


class _WsgiStream:
    """The answer of an application that has not ended yet: an async iterator of bytes."""

    def __init__(self, call):
        self.call = call

    def __aiter__(self):
        return self

    async def __anext__(self):
        call = self.call
        await call._news()
        data = b"".join(call.blocks.popleft() for _ in range(len(call.blocks)))
        if data:
            call.taken += len(data)
            return data
        if call.error is not None:
            raise call._failure()
        raise StopAsyncIteration

    async def aclose(self):
        self.call.leave()

    def __del__(self):
        self.call.leave()


class _WsgiThreads:
    """The threads of one hosted application in one kernel."""

    def __init__(self, most):
        self.most, self.count = most, 0             # threads; the count changes on one worker, whose pinned tasks do it
        self.limiter = flowcoro.Semaphore(most)
        self.waiting = collections.deque()          # calls that no thread has taken yet
        self.idle = []                              # locks of threads that wait for one
        self.token = [None]                         # of the thread that is about to look for one
        self.rung, self.bells = collections.deque(), []         # calls with news, and the Promise that somebody waits for
        self.starting = self.over = False
        flowcoro.spawn(self._listen(), name="hear WSGI threads", pinned=True)

    # -- in the kernel

    def submit(self, call):
        self.waiting.append(call)
        if not self.starting:
            self.starting = True
            flowcoro.spawn(self._start(), name="wake a WSGI thread")

    async def _start(self):
        self.starting = False
        self.wake_one()

    async def _listen(self):
        try:
            while True:
                self._answer_rings()
                bell = flowcoro.Promise()
                self.bells.append(bell)
                if self.rung:                       # since before the bell was there
                    self._ring()
                await bell
        finally:                                    # the run ends: nobody waits for threads that have nothing to do
            self.over = True
            while self.idle:
                self.idle.pop().release()

    def _answer_rings(self):
        for _ in range(len(self.rung)):
            call = self.rung.popleft()
            if call is not None:
                call.wake()
            elif self.waiting and self.count < self.most:
                self.count += 1
                flowcoro.spawn(self._thread(), name="a WSGI thread", pinned=True)
            else:
                self._give_back()

    async def _thread(self):
        token = [None]
        try:
            await flowcoro.to_thread(self._work, token, abandon_on_cancel=True, limiter=self.limiter)
        except RuntimeError as error:               # the system has no more of them
            flowcoro.report_error(error, "a thread for WSGI applications", "flowcoro_http")
            while self.waiting and self.count == 1:
                self.waiting.popleft().fail(error)
        finally:
            self.count -= 1
            if token:
                self._give_back()

    # -- in any thread

    def ring(self, call):
        """Have the call's task look at it; None: a thread is wanted."""
        self.rung.append(call)
        self._ring()

    def _ring(self):
        try:
            self.bells.pop().set_result(None)
        except IndexError:                          # it has been rung already
            pass

    def wake_one(self):
        """See that somebody looks for waiting calls (W3)."""
        try:
            self.token.pop()
        except IndexError:                          # somebody is about to
            return
        try:
            self.idle.pop().release()
        except IndexError:
            if self.count < self.most:
                self.ring(None)
            else:
                self._give_back()

    def _give_back(self):
        """The token; and look again, for a thread may have looked while it was away, and be idle now."""
        self.token.append(None)
        if self.waiting and self.idle:
            self.wake_one()

    # -- in a thread

    def _work(self, token):
        lock, has_token = threading.Lock(), True
        lock.acquire()
        token.clear()
        while True:
            try:
                call = self.waiting.popleft()
            except IndexError:
                call = None
            if has_token:
                has_token = False
                self.token.append(None)
            if call is not None:
                if self.waiting:
                    self.wake_one()
                if not call.gone:
                    call.run()
                call = None
                continue
            self.idle.append(lock)
            if self.waiting:                        # since before it was idle
                self.wake_one()
            if self.over:                           # since before it was idle
                return
            if lock.acquire(timeout=WSGI_IDLE):
                has_token = True
                if self.over and not self.waiting:
                    return
                continue
            try:
                self.idle.remove(lock)
            except ValueError:                      # taken this very moment
                lock.acquire()
                has_token = True
            else:
                if not self.waiting:
                    return


def wsgi_app(application, *, threads=WSGI_THREADS):
    """A handler that answers with a WSGI application (PEP 3333): app.mount("/", wsgi_app(application), encoded_slashes=True).

    It runs in threads, at most `threads` at once; more requests wait for one. Its context variables are those of the request, and
    flowcoro.run_from_thread() runs a coroutine for it. wsgi.input is a file that reads from the connection, to the end of the
    content also if that is chunked; 100 Continue is sent when it is first read; a read may raise ProtocolError, HttpError (413)
    or BrokenError, which are the answer if they are let pass. An answer that is complete when the first of it could be sent has
    a Content-Length, another one is sent as it is made, and the application waits when 64 KiB are ahead of the client.
    wsgi.file_wrapper has the system send a file. Fields with "_" in their names are left out, as is Proxy.

    Errors of the application, and what PEP 3333 forbids, are reported with its stack and answered with 500, or by cutting the
    connection if the answer has begun. Cancelled, as when the client has gone: a thread cannot be interrupted. A call that
    waits is not made; one that runs goes on to where it next gives a block, writes or reads: there its iterable is closed, or
    ConnectionAbortedError is raised; what it returns is dropped, its errors are reported.
    TypeError for what cannot be called, ValueError for a number of threads that makes no sense.
    """
    if not callable(application):
        raise TypeError(f"wsgi_app({application!r}): give the application, a callable that takes environ and start_response")
    if type(threads) is not int or threads < 1:
        raise ValueError(f"wsgi_app(threads={threads!r}): give a number of threads, 1 or more")
    pools, making = weakref.WeakKeyDictionary(), threading.Lock()       # kernel -> _WsgiThreads, of which each gets one

    async def handler(request, rest=None):
        kernel = flowcoro.current_kernel()
        pool = pools.get(kernel)
        if pool is None:
            with making:
                pool = pools.get(kernel)
                if pool is None:
                    pool = pools[kernel] = _WsgiThreads(threads)
        call = _WsgiCall(pool, application, request)
        call.environ = _wsgi_environ(request, rest, await _wsgi_content(request, call))
        try:
            return await call.answer()
        except BaseException:
            call.leave()
            raise
    return handler


async def _wsgi_content(request, call):
    """wsgi.input: what is small in memory, the rest from the connection as it is read."""
    headers = request.headers
    if request.content is None and ("content-length" in headers or "transfer-encoding" in headers):
        length = headers.get("content-length")
        if length is None or int(length) > WSGI_READ_BEFORE or "expect" in headers:
            return io.BufferedReader(_WsgiInput(call), WSGI_READ_BEFORE)
        await request.body()
    return io.BytesIO(request.content or b"")


# ---- hosting: ASGI --------------------------------------------------------------------------------------------
#
# An ASGI application is a coroutine function that waits only on what it is given, receive() and send(); so it runs on any kernel,
# and as a task of its own: it may go on when its answer is complete. What belongs to asyncio it cannot use, and is told so.
#
#     A1  what may be sent when is one table; a missing key is the error
#     A2  its task has ended, or been cancelled, disconnect_timeout after its client has gone or its answer has been dropped;
#         after a complete answer it may go on until the server ends
#     A3  send() returns when the server has taken what it was given, so the application is as fast as its client

# Seconds that an application has to end by itself: once its client is gone, and when the server ends.
ASGI_DISCONNECT = ASGI_SHUTDOWN = 5.0

_ASGI = {"version": "3.0", "spec_version": "2.5"}
_A_START, _A_BODY, _A_TRAILERS, _A_DONE = "nothing sent", "the answer begun", "the content complete", "the answer complete"
_ASGI_MOVES = {                 # what send() takes when
    (_A_START, "http.response.start"): "_send_start", (_A_START, "http.response.early_hint"): "_send_hint",
    (_A_BODY, "http.response.body"): "_send_body", (_A_TRAILERS, "http.response.trailers"): "_send_trailers",
}
_REACHES = ("no running event loop", "there is no current event loop", "no current event loop")
_REACHES_BY = frozenset(["AsyncLibraryNotFoundError", "NoEventLoopError"])      # sniffio's and anyio's, which are not here


@_known
def _asgi_name(name):
    return name.lower().encode("latin-1")


def _asgi_scope(kind, request, rest, state):
    """What http and websocket have in common."""
    path = request.path
    client, server = request.client, request.server
    scope = {
        "type": kind, "asgi": _ASGI.copy(), "http_version": request.version, "scheme": request.scheme, "path": path,
        "raw_path": request.raw_path.encode("latin-1"), "query_string": request.query_string.encode("latin-1"),
        "root_path": "" if rest is None else path[:len(path) - len(rest)].removesuffix("/"),
        "headers": [(_asgi_name(name), value.encode("latin-1")) for name, value in request.headers.items()],
        "client": client if type(client) is tuple else None,
        "server": server if type(server) is tuple else (server, None) if server else None,
    }
    if state is not None:
        scope["state"] = state.copy()
    return scope


def _asgi_headers(message):
    """The Headers of a message; Transfer-Encoding is the server's (ASGI: "Response Start")."""
    pairs = []
    for name, value in message.get("headers", ()):
        if name.__class__ is not bytes or value.__class__ is not bytes:
            raise TypeError(f"{message['type']}: headers are pairs of bytes, got ({name!r:.40}, {value!r:.80})")
        if name.lower() != b"transfer-encoding":
            pairs.append((name.decode("latin-1"), value.decode("latin-1")))
    return Headers(pairs)


def _asgi_type(message):
    """The type of what an application sends; TypeError if it is no message."""
    if not isinstance(message, dict) or not isinstance(message.get("type"), str):
        raise TypeError(f"send() takes a dict with a \"type\", such as \"http.response.start\", got {message!r:.80}")
    return message["type"]


def _asgi_field(message, name, kind, default=None):
    value = message.get(name, default)
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        raise TypeError(f"{message['type']}: {name!r} is {value!r:.80}; give {' or '.join(each.__name__ for each in kinds)}")
    return value


def _asgi_failure(application, error):
    """The error of an application, or what is to be said instead of it."""
    text, kind = str(error), type(error).__name__
    if (isinstance(error, RuntimeError) and text.lower().startswith(_REACHES) or kind in _REACHES_BY
            or isinstance(error, TypeError) and text.startswith("a task yielded ")
            or isinstance(error, AttributeError) and error.name == "create_future" and error.obj is None):
        # (the last: asyncio's Event, Lock, Queue and so on take the loop that runs, None, without asking whether there is one)
        failure = RuntimeError(
            f"the ASGI application {_shown_handler(application)} reaches for another event loop, most likely asyncio's: "
            f"\"{text}\". "
            "FlowCoro runs it without one: it may wait for receive() and send(), and for what is FlowCoro's (flowcoro.sleep, "
            "flowcoro_net, flowcoro_http.HttpClient). For the rest use await flowcoro.to_thread(asyncio.run, coroutine), or an "
            "asyncio server")
    elif isinstance(error, Exception):
        return error
    else:
        failure = RuntimeError(f"the ASGI application {_shown_handler(application)} raised {kind}")     # it would end the run
    failure.__cause__ = error
    return failure


def _listed(request, name):
    """The elements of all fields of that name."""
    return _split_list(request.headers._combined(name))


def _is_gone():
    return flowcoro_net.BrokenError(errno.ECONNABORTED, "send(): the client is gone; receive() gives http.disconnect")


class _AsgiCall:
    """A request at an application: its receive(), its send(), and what becomes of the answer."""

    def __init__(self, host, request, scope):
        self.host, self.request, self.scope = host, request, scope
        self.state = _A_START
        self.response = None            # as soon as it begins
        self.channel = None             # of the pieces of a streamed answer
        self.has_trailers = False
        self.ready = flowcoro.Event()   # the response is there, or will never be
        self.over = flowcoro.Event()    # the answer is complete, or its client gone: nothing more can be received
        self.gone = False
        self.error = self.lost = self.task = self.chunks = self.reading = None
        self.left = None                # bytes of the content that are still to come; None: not known

    async def run(self):
        host, error = self.host, None
        try:
            await host.application(self.scope, self.receive, self.send)
            if self.state is not _A_DONE and not self.gone:
                raise RuntimeError(f"{self!r}: it returned with {self.state}")
        except flowcoro.Cancelled:
            error = RuntimeError(f"{self!r}: it was cancelled with {self.state}")
            raise
        except BaseException as raised:
            error = _asgi_failure(host.application, raised)
            late = self.state is _A_DONE or self.gone
            if late and not (self.gone and isinstance(error, (flowcoro_net.BrokenError, flowcoro.ClosedError))):
                flowcoro.report_error(error, f"{self!r}: it failed after the answer", "flowcoro_http")
        finally:
            self.error = error
            self.ready.set()
            if self.channel is not None:
                self.channel.close()
            host.running.discard(self)

    # -- what the application is given

    async def receive(self):
        if not self.over.is_set() and self.left != 0 and self.state is not _A_DONE:
            try:
                with flowcoro.CancelScope() as self.reading:
                    return await self._receive_content()
            except (OSError, ProtocolError) as error:
                source = self.request._source
                if source is None or not source.sock.hung_up:
                    raise               # what it has sent is no HTTP, or too much
                self.lost = error
                self.disconnect()
            finally:
                self.reading = None
        await self.over.wait()
        return {"type": "http.disconnect"}

    async def _receive_content(self):
        request = self.request
        if self.chunks is None:
            length = request.headers.get("content-length")
            self.left = None if length is None else int(length)
            if length is None and "transfer-encoding" not in request.headers or request.content is not None:
                content, self.left = request.content or b"", 0
                return {"type": "http.request", "body": content, "more_body": False}
            self.chunks = request.stream()
        data = await anext(self.chunks, b"")
        if self.left is not None:
            self.left -= len(data)
        if not data:
            self.left = 0
        return {"type": "http.request", "body": data, "more_body": self.left != 0}

    async def send(self, message):
        kind = _asgi_type(message)
        if self.gone:
            raise _is_gone()
        move = _ASGI_MOVES.get((self.state, kind))
        if move is None:
            raise RuntimeError(f"{self!r}: {kind} cannot be sent with {self.state}; now "
                               + (" or ".join(key[1] for key in _ASGI_MOVES if key[0] is self.state) or "nothing") + " can")
        await getattr(self, move)(message)

    async def _send_hint(self, message):
        links = [("Link", link.decode("latin-1")) for link in message["links"]]
        await self.request.inform(103, links)

    async def _send_start(self, message):
        status = _asgi_field(message, "status", int)
        if not 200 <= status <= 599:
            raise ValueError(f"http.response.start: the status {status} is none from 200 to 599")
        self.has_trailers = bool(message.get("trailers"))
        self.response = _response_of(status, _asgi_headers(message), None)
        self.state = _A_BODY

    async def _send_body(self, message):
        body, more = _asgi_field(message, "body", (bytes, bytearray, memoryview), b""), bool(message.get("more_body"))
        response, streamed = self.response, self.channel is not None
        if not streamed and not more and not self.has_trailers:
            response.content = bytes(body)
        else:
            if not streamed:
                self.channel = flowcoro.Channel()
                response.content, response.stream = None, _AsgiStream(self)
            if self.request.method != "HEAD":           # to that all of it is nothing, and waits for nobody
                self.ready.set()
                if body:
                    await self._give(bytes(body))
        if not more and self.has_trailers:
            self.state = _A_TRAILERS
        elif not more:
            self._complete()

    async def _give(self, piece):
        try:
            await self.channel.send(piece)
        except flowcoro.ClosedError:
            raise _is_gone() from None

    async def _send_trailers(self, message):
        trailers = Headers([*(getattr(self.response, "trailers", None) or ()), *_asgi_headers(message)])
        self.response.trailers = trailers
        if not message.get("more_trailers"):
            self._complete()

    def _complete(self):
        self.state = _A_DONE
        self.ready.set()
        if self.channel is not None:
            self.channel.close()
        else:
            self.over.set()

    # -- what the task of the request does

    async def answer(self):
        """The Response."""
        self.host.running.add(self)
        self.task = flowcoro.spawn(self.run(), name=self.host.__qualname__)
        try:
            await self.ready.wait()
        except BaseException:
            await self.leave()
            raise
        if self.state is not _A_DONE and (self.channel is None or self.request.method == "HEAD"):       # nothing has been sent
            raise self.lost or self.error or _is_gone()
        return self.response

    def disconnect(self):
        """The client is gone."""
        if not self.over.is_set():
            self.gone = self.state is not _A_DONE or self.channel is not None
            self.over.set()
            if self.channel is not None:
                self.channel.close()
            if self.reading is not None:
                self.reading.cancel()

    async def leave(self):
        """Nobody wants the rest: it is told so, and cancelled if it does not end by itself."""
        self.disconnect()
        if self.gone:
            with flowcoro.CancelScope(shield=True):
                await _end_soon(self.task, self.host.disconnect_timeout)

    def __repr__(self):
        return f"<{self.request.method} {_shown(self.request.target)} at {_shown_handler(self.host.application)}>"


async def _end_soon(task, seconds):
    """Wait for a task's end, and cancel it after so many seconds; its result is nobody's."""
    with contextlib.suppress(Exception), flowcoro.move_on_after(seconds):
        await task
    if not task.done():
        task.cancel()
        with contextlib.suppress(Exception):
            await task


class _AsgiStream:
    """A streamed answer: an async iterator of bytes."""

    def __init__(self, call):
        self.call = call

    def __aiter__(self):
        return self

    async def __anext__(self):
        call = self.call
        try:
            return await call.channel.receive()
        except flowcoro.EndOfChannel:
            if call.state is not _A_DONE:
                raise call.error or _is_gone() from None
            raise StopAsyncIteration from None

    async def aclose(self):
        call = self.call
        if call.state is _A_DONE and not len(call.channel):
            call.over.set()
        else:
            await call.leave()


class _AsgiHost:
    """What asgi_app() returns: a handler, and `lifespan` for HttpServer.lifespan()."""

    def __init__(self, application, websocket, disconnect_timeout):
        self.application, self.websocket, self.disconnect_timeout = application, websocket, disconnect_timeout
        self.__qualname__ = f"asgi_app({_shown_handler(application)})"
        self.state = None               # what the application has kept in its lifespan, if it has one
        self.running = set()            # calls that have not ended

    async def __call__(self, request, rest=None):
        if ("upgrade" in request.headers and request.method == "GET"
                and "websocket" in map(str.lower, _listed(request, "upgrade"))):
            return await self._answer_websocket(request, rest)
        scope = _asgi_scope("http", request, rest, self.state)
        scope["method"] = request.method
        scope["extensions"] = {"http.response.trailers": {}, "http.response.early_hint": {}}
        return await _AsgiCall(self, request, scope).answer()

    async def _answer_websocket(self, request, rest):
        if self.websocket is None:
            raise HttpError(501, "no WebSocket is spoken here: this application was hosted without one (asgi_app(websocket=))")
        scope = _asgi_scope("websocket", request, rest, self.state)
        scope["scheme"] = "wss" if request.scheme == "https" else "ws"
        scope["subprotocols"] = _listed(request, "sec-websocket-protocol")
        scope["extensions"] = {"websocket.http.response": {}}
        return await _AsgiWebSocket(self, request, scope).answer()

    @contextlib.asynccontextmanager
    async def lifespan(self):
        """The lifespan of the application: an async context manager. RuntimeError: it says that it cannot start."""
        life = _AsgiLife(self.application)
        task = flowcoro.spawn(life.run(), name="ASGI lifespan")
        try:
            await life.started.wait()
            if life.failed is not None:
                raise RuntimeError(f"the ASGI application {_shown_handler(self.application)} cannot start: {life.failed}")
            self.state = life.state if life.supported else None
            yield
            for call in list(self.running):
                await _end_soon(call.task, ASGI_SHUTDOWN)
            life.stopping.set()
            with flowcoro.move_on_after(ASGI_SHUTDOWN):
                await life.stopped.wait()
        finally:
            with flowcoro.CancelScope(shield=True):
                await _end_soon(task, 0)


class _AsgiLife:
    """The lifespan of an application: ASGI, "Lifespan Protocol"."""

    def __init__(self, application):
        self.application, self.state = application, {}
        self.supported, self.failed = True, None
        self.asked = 0                  # how often it has called receive()
        self.told = False               # that it is to shut down
        self.started, self.stopping, self.stopped = flowcoro.Event(), flowcoro.Event(), flowcoro.Event()

    async def run(self):
        try:
            await self.application({"type": "lifespan", "asgi": _ASGI.copy(), "state": self.state}, self.receive, self.send)
        except flowcoro.Cancelled:
            raise
        except BaseException as error:
            if self.started.is_set() and self.failed is None:
                flowcoro.report_error(_asgi_failure(self.application, error), "an ASGI lifespan failed", "flowcoro_http")
            elif not self.started.is_set() and (failure := _asgi_failure(self.application, error)) is not error:
                self.failed = str(failure)              # asyncio's loop: it would fail with each request
            elif not self.started.is_set() and self.asked and self.supported:
                flowcoro.report_error(error, f"the lifespan of {_shown_handler(self.application)} failed before it had "
                                      "started; as ASGI has it, it is served without one", "flowcoro_http")
            self.supported = self.started.is_set()      # else it raised because it has none: ASGI takes that for an answer
        finally:
            self.supported = self.supported and self.started.is_set()
            self.started.set()
            self.stopped.set()

    async def receive(self):
        self.asked += 1
        if self.asked == 1:
            return {"type": "lifespan.startup"}
        await self.stopping.wait()
        if self.told:                   # an application that receives for ever waits here to be cancelled
            await flowcoro.Event().wait()
        self.told = True
        return {"type": "lifespan.shutdown"}

    async def send(self, message):
        kind = _asgi_type(message)
        if kind in ("lifespan.startup.complete", "lifespan.startup.failed") and not self.started.is_set():
            if kind == "lifespan.startup.failed":
                self.failed = message.get("message") or "it does not say why"
            self.started.set()
        elif kind in ("lifespan.shutdown.complete", "lifespan.shutdown.failed") and self.stopping.is_set():
            if kind == "lifespan.shutdown.failed":
                flowcoro.report_error(RuntimeError(message.get("message") or "it does not say why"),
                                      "an ASGI application could not shut down", "flowcoro_http")
            self.stopped.set()
        else:
            if not kind.startswith("lifespan."):        # it does not look at what it is called for
                self.supported = False
            raise RuntimeError(f"{kind} cannot be sent in a lifespan {'after' if self.started.is_set() else 'before'} its start")


class _AsgiWebSocket:
    """A WebSocket at an application. What speaks WebSocket is websocket= of asgi_app()."""

    def __init__(self, host, request, scope):
        self.host, self.request, self.scope = host, request, scope
        self.state, self.ws = "connecting", None        # then "open", then "closed"; or "denied"
        self.asked, self.decided = False, flowcoro.Event()      # whether it has asked for the connect; has accepted or refused
        self.response = Response(403, "the application has refused the WebSocket")

    async def answer(self):
        try:
            await self.host.application(self.scope, self.receive, self.send)
        except Exception as error:
            if self.state == "open":
                await self.ws.close(1011)
            if isinstance(self.response, HttpError):
                raise self.response from error
            raise _asgi_failure(self.host.application, error) from error.__cause__
        if self.state == "open":
            await self.ws.close()
        if isinstance(self.response, HttpError):
            raise self.response
        return self.response

    async def receive(self):
        if not self.asked:
            self.asked = True
            return {"type": "websocket.connect"}
        await self.decided.wait()
        if self.state == "open":
            try:
                message = await self.ws.receive()
                return {"type": "websocket.receive", "text" if isinstance(message, str) else "bytes": message}
            except flowcoro_net.BrokenError:            # its ConnectionClosed, whose class is not known here
                self.state = "closed"
        ws = self.ws
        return {"type": "websocket.disconnect", "code": ws and ws.close_code or 1006, "reason": ws and ws.close_reason or ""}

    async def send(self, message):
        kind = _asgi_type(message)
        move = {
            ("connecting", "websocket.accept"): self._accept, ("connecting", "websocket.close"): self._deny,
            ("connecting", "websocket.http.response.start"): self._deny_by,
            ("denied", "websocket.http.response.body"): self._deny_with,
            ("open", "websocket.send"): self._send, ("open", "websocket.close"): self._close,
        }.get((self.state, kind))
        if move is None and self.state == "closed" and kind in ("websocket.send", "websocket.close"):
            raise _is_gone()
        if move is None:
            raise RuntimeError(f"{self.request!r}: {kind} cannot be sent to a WebSocket that is {self.state}")
        try:
            await move(message)
        finally:
            if self.decided is not None and self.state != "connecting":
                self.decided.set()

    async def _accept(self, message):
        chosen, offered = message.get("subprotocol"), self.scope["subprotocols"]
        if chosen is not None and chosen not in offered:
            raise ValueError(f"websocket.accept: subprotocol={chosen!r:.80} is none of those that the client speaks: {offered}")
        options = {"subprotocols": () if chosen is None else (chosen,), "headers": _asgi_headers(message).items()}
        try:
            self.ws = await _accepted(self.host.websocket, self.request, options)
        except HttpError as error:
            self.response, self.state = error, "closed"
            self.decided.set()
            raise _is_gone() from error
        self.state, self.response = "open", Response(204)       # of which middleware hears, and nobody else
        self.decided.set()

    async def _deny(self, message):
        self.state = "closed"
        self.decided.set()

    async def _deny_by(self, message):
        self.response = Response(_asgi_field(message, "status", int), b"", _asgi_headers(message))
        self.state = "denied"
        self.decided.set()

    async def _deny_with(self, message):
        self.response.content += _asgi_field(message, "body", bytes, b"")
        if not message.get("more_body"):
            self.state = "closed"

    async def _send(self, message):
        text = message.get("text")
        await self.ws.send(_asgi_field(message, "bytes", bytes) if text is None else _asgi_field(message, "text", str))

    async def _close(self, message):
        self.state = "closed"
        try:
            await self.ws.close(message.get("code", 1000), message.get("reason") or "")
        except Exception:               # a code or a reason that cannot be sent
            self.state = "open"
            raise


def asgi_app(application, *, websocket=None, disconnect_timeout=ASGI_DISCONNECT):
    """A handler that answers with an ASGI 3 application, one that waits only on receive() and send(), or on what is FlowCoro's.

    host = asgi_app(application); app.mount("/", host, encoded_slashes=True); app.lifespan(host.lifespan). One that reaches for
    asyncio's loop gets an error that says so, and 500 is answered. In its lifespan startup.failed ends the start (RuntimeError).
    What it keeps in the lifespan's state is in each scope. Extensions: http.response.trailers (which go out as a Response's), and
    http.response.early_hint.

    It runs in a task of its own, and may go on when its answer is complete, until the server ends and 5 s longer. send() returns
    when the server has taken what was sent before. When the client has gone, receive() gives http.disconnect and send() raises
    BrokenError, an OSError; after `disconnect_timeout` seconds it is cancelled. What the specification forbids raises
    RuntimeError, TypeError or ValueError in send(); an error is reported and answered with 500, or by cutting the connection.

    websocket: what speaks WebSocket, flowcoro_websocket.accept (functools.partial(accept, origins=…) gives it options); without
    it such requests are answered with 501, and the application never sees them. A handshake that is none is answered when the
    application accepts it, whose send() raises an OSError then. When the server ends it receives websocket.disconnect, 1001.
    """
    if not callable(application):
        raise TypeError(f"asgi_app({application!r}): give the application, an async callable that takes scope, receive and send")
    return _AsgiHost(application, websocket, disconnect_timeout)
