"""flowcoro_rpc 0.1.0: JSON-RPC 2.0 to the letter, in both directions over one connection: codec, server, client.

To vendor, copy: flowcoro.py, flowcoro_net.py, flowcoro_schema.py, flowcoro_rpc.py

Example:

    import flowcoro, flowcoro_rpc

    server = flowcoro_rpc.RpcServer()

    @server.method
    async def add(a: int, b: int) -> int:
        return a + b

    async def main():
        listening = await server.start_tcp_server(0)
        async with await flowcoro_rpc.RpcClient.connect(*listening.local) as client:
            print(await client.call("add", 1, 2), await client.call("add", a=3, b=4))
        await server.close()

    flowcoro.run(main())

Contents: constants · errors · framings · codec · methods · transports · peers: what goes out, calls, what comes in · server ·
client · pool

How it works:

A *framing* cuts a stream of bytes into messages; the *codec* turns a message into an event, and what is to be said into bytes.
Neither does input or output.

    receive_data(data)   what the peer has sent
    next_message()       the next whole message; NEED_DATA while there is too little
    read_message(data)   Request, Notification, Response, Batch, or Invalid with the code that answers it

A *Peer* is one end of one connection. Both ends are alike: each calls the other, and answers it. One task at a time reads. It makes
the first step of a handler itself, and most end in that; when one has to wait, the task stays with it, and another one reads on:

    R1  one task reads; a call that waits has the task that has read it, and a call that does not wait costs none
    R2  a call ends exactly once: by the answer, by its timeout or cancellation here, or by the end of the connection, whichever is
        first; who takes it out of `_pending` settles it
    R3  what is answered in one turn leaves in one write; what the system does not take waits, and who reads stops reading while
        more than MAX_UNSENT bytes wait

Errors:

    flowcoro.FlowCoroError
      RpcError              the answer is an error: code, message, data; a handler raises it to answer with one
        ParseError          -32700  the message is no JSON
        InvalidRequest      -32600  … or no JSON-RPC
        MethodNotFound      -32601
        InvalidParams       -32602  data: what is wrong with them, as flowcoro_schema.Errors.first has it
        InternalError       -32603  data: {"reference": …}, which the server has reported with the error itself
        DeadlineExceeded    -32010  the server has ended it, as its time was up
        ShuttingDown        -32011  the server is being closed; it has not run
        AnswerTooLarge      -32012  it has run, and its result is more than a message may have
        CallCancelled       -32800  by $/cancelRequest (the number is LSP's)
      ProtocolError         the peer has sent what cannot be a message; the connection is closed
      ConnectionLost        the connection has ended before the answer; sent: whether the call may have run; also a
                            flowcoro_net.BrokenError
      flowcoro_net.LimitError     a message of our own is too large
      flowcoro.ClosedError  you closed it
    TimeoutError            a timeout= has passed

Sources: JSON-RPC 2.0 Specification (2013-01-04); Language Server Protocol 3.17, base protocol ($/cancelRequest, Content-Length);
D. J. Bernstein, Netstrings; OpenRPC 1.3; the leader/followers pattern (Schmidt et al., POSA2).

What it does not do: JSON-RPC 1.0; HTTP and WebSocket by itself (answer() and serve_messages() are what they mount).

SPDX-License-Identifier: MIT
"""

import collections
import contextvars
import functools
import inspect
import itertools
import math
import re
import struct
import types
import typing
import uuid

import flowcoro
import flowcoro_net
import flowcoro_schema

__version__ = "0.1.0"

__all__ = ["RpcServer", "RpcClient", "Peer", "Context", "Methods", "Newline", "ContentLength", "Netstring", "LengthPrefixed",
           "Concatenated", "NEED_DATA", "Request", "Notification", "Response", "Batch", "Invalid", "read_message",
           "encode_request", "encode_result", "encode_error", "RpcError", "ParseError", "InvalidRequest", "MethodNotFound",
           "InvalidParams", "InternalError", "DeadlineExceeded", "ShuttingDown", "AnswerTooLarge", "CallCancelled",
           "ProtocolError", "ConnectionLost"]

# ---- constants ------------------------------------------------------------------------------------------------

# Bytes of a message at most, either way. aiohttp takes bodies of 1 MiB too, gRPC messages of 4 MiB.
MAX_MESSAGE = 2**20

# Members of a batch at most (go-ethereum: 1,000). What the answers to one have at most is max_message, too.
MAX_BATCH = 1000

# Calls of one connection, and of a server, that run at once; more wait. HTTP/2 servers allow 100 to 250 streams.
MAX_CONCURRENT, MAX_CONCURRENT_IN_ALL = 100, 10_000

# Calls of one connection that wait for their turn; when there are so many, nothing more is read.
MAX_WAITING = 100

# Seconds that a call waits for its answer, and that one may run on the server, unless it is told otherwise.
CALL_TIMEOUT, DEADLINE = 30.0, 60.0

# Bytes that wait to be sent before who reads, and who calls, waits too.
MAX_UNSENT = 2**20

# Bytes that are written at once, and seconds in which the peer has to take them: else it is taken for dead.
WRITE_CHUNK, WRITE_TIMEOUT = 256 * 2**10, 60.0

# Seconds for the calls under way when a server is closed; flowcoro_net has the same.
DRAIN_TIMEOUT = 8.0

# Bytes that one read asks for.
CHUNK = 64 * 2**10

# Bytes of the head of a Content-Length frame at most; what is sent has 20 to 90.
MAX_HEAD = 4096

_MISSING = flowcoro_schema.MISSING


# ---- errors ---------------------------------------------------------------------------------------------------

class RpcError(flowcoro.FlowCoroError):
    """An answer that is an error: `code` (int), `message` (str), `data` (a value of JSON, or None where there is none).

    A handler raises it to answer so. Codes from -32768 to -32000 are the specification's; your own are others.
    """

    def __init__(self, code, message, data=None):
        super().__init__(f"{message} ({code})" if data is None else f"{message} ({code}): {data!r:.200}")
        self.code, self.message, self.data = code, message, data


class _Known(RpcError):
    """Of one code."""

    def __init__(self, data=None, message=None):
        super().__init__(self.code, message or self.message, data)


class ParseError(_Known):
    """The message is no JSON."""

    code, message = -32700, "Parse error"


class InvalidRequest(_Known):
    """The message is JSON, and no JSON-RPC; or it is beyond a limit."""

    code, message = -32600, "Invalid Request"


class MethodNotFound(_Known):
    """There is no method of this name."""

    code, message = -32601, "Method not found"


class InvalidParams(_Known):
    """The parameters are not those that the method takes."""

    code, message = -32602, "Invalid params"


class InternalError(_Known):
    """The handler has failed; `data["reference"]` is in the report of the server."""

    code, message = -32603, "Internal error"


class DeadlineExceeded(_Known):
    """The server has ended the call: it took too long."""

    code, message = -32010, "Deadline exceeded"


class ShuttingDown(_Known):
    """The server is being closed. The call has not run."""

    code, message = -32011, "Shutting down"


class AnswerTooLarge(_Known):
    """The call has run, and its result has more bytes than a message may have."""

    code, message = -32012, "Answer too large"


class CallCancelled(_Known):
    """The call was cancelled by $/cancelRequest."""

    code, message = -32800, "Request cancelled"


_BY_CODE = {kind.code: kind for kind in (ParseError, InvalidRequest, MethodNotFound, InvalidParams, InternalError,
                                         DeadlineExceeded, ShuttingDown, AnswerTooLarge, CallCancelled)}


def _as_error(error):
    """The exception for the error member of an answer."""
    code, message, data = error["code"], error["message"], error.get("data")
    kind = _BY_CODE.get(code)
    return RpcError(code, message, data) if kind is None else kind(data, message)


class ProtocolError(flowcoro.FlowCoroError):
    """The peer has sent what cannot be cut into messages, or is larger than one may be. `code`: what the answer to it has."""

    code = InvalidRequest.code


class ConnectionLost(flowcoro_net.BrokenError):
    """The connection has ended before the answer.

    `sent`: False: the call has not run; True: all of it was sent, and it may have run; None: nobody knows.
    """

    def __init__(self, message, sent=None):
        super().__init__(None, message)
        self.sent = sent


# ---- framings -------------------------------------------------------------------------------------------------
#
# Each cuts a stream into messages: bytes go in by receive_data(), and whole messages come out of next_message(). Whatever way the
# bytes were split, the messages are the same, and each byte is looked at a bounded number of times. The limit holds before
# anything is kept for a message that is larger.

class _Sign:
    """A thing that is only itself."""

    __slots__ = ("name",)

    def __init__(self, name):
        self.name = name

    def __repr__(self):
        return self.name


NEED_DATA = _Sign("NEED_DATA")


class _Framing:
    """What all have: `max_message` bytes at most, and what has come and was not yet given out, from `_at` on."""

    __slots__ = ("max_message", "_buffer", "_at", "_scan")

    def __init__(self, max_message=MAX_MESSAGE):
        self.max_message = max_message
        self._buffer = bytearray()
        self._at = 0            # where the next message begins
        self._scan = 0          # up to where its end was looked for

    def receive_data(self, data):
        """What the peer has sent."""
        if self._at:
            del self._buffer[:self._at]
            self._scan -= self._at
            self._at = 0
        self._buffer += data

    def receive_end(self):
        """The peer sends no more. ProtocolError if that is in the middle of a message."""
        if len(self._buffer) > self._at:
            raise ProtocolError(f"the peer ended in the middle of a message, after {len(self._buffer) - self._at} bytes of it")

    def _take(self, start, end, after):
        """The message from `start` to `end`; the next one begins at `after`."""
        self._at = self._scan = after
        return bytes(self._buffer[start:end])

    def _too_large(self, size):
        return ProtocolError(f"a message of {size} bytes, where max_message={self.max_message} are allowed; allow more there, or "
                             "send several")


class Newline(_Framing):
    """A message is a line (the default). Empty lines are skipped; the last one may have no end."""

    __slots__ = ("_ended",)

    def __init__(self, max_message=MAX_MESSAGE):
        super().__init__(max_message)
        self._ended = False

    def next_message(self):
        """The next message, or NEED_DATA. ProtocolError when it is too large."""
        while True:
            buffer, start = self._buffer, self._at
            end = buffer.find(b"\n", self._scan)
            if (size := (end if end >= 0 else len(buffer)) - start) > self.max_message:
                raise self._too_large(f"{'at least ' * (end < 0)}{size}")
            if end < 0:
                if not self._ended or not size:
                    self._scan = len(buffer)
                    return NEED_DATA
                end = len(buffer)
            message = self._take(start, end, min(end + 1, len(buffer)))
            if message and message != b"\r":
                return message

    def receive_end(self):
        """The peer sends no more: what there is, is a line."""
        self._ended = True

    @staticmethod
    def frame(message):
        """A message as bytes to send; it has no newline."""
        return message + b"\n"


# ---- codec ----------------------------------------------------------------------------------------------------
#
# A message is judged by read_message(); of a batch each member alone. What has a "method" is a request; else what has a "result" or
# an "error" is an answer. An answer that is none is not answered: two ends would tell each other of it for ever.

class Request(typing.NamedTuple):
    """A call: it has an id (str, int, float or None), and wants an answer. params: a list, a dict, or None where there are none.

    more: the whole object, for members that are not the specification's.
    """

    method: str
    params: object
    id: object
    more: dict = {}


class Notification(typing.NamedTuple):
    """A call that wants no answer."""

    method: str
    params: object
    more: dict = {}


class Response(typing.NamedTuple):
    """An answer: a result, or error, a dict with code, message and perhaps data."""

    id: object
    result: object
    error: object


class Batch(typing.NamedTuple):
    """Several in one message: a list of the other events."""

    members: list


class Invalid(typing.NamedTuple):
    """What is no such thing: the id, where there is a valid one, the code to answer with, and why; code is None for what is
    not answered, as it would be an answer to an answer."""

    id: object
    code: object
    why: str


_ID_TYPES = (int, str, float, type(None))


def _judge(value):
    """The event of one object."""
    if value.__class__ is not dict:
        return Invalid(None, InvalidRequest.code, "it is no object")
    if "method" not in value and ("result" in value or "error" in value):
        return _judge_response(value)
    number = value.get("id", _MISSING)
    if number is not _MISSING and number.__class__ not in _ID_TYPES:
        return Invalid(None, InvalidRequest.code, "the id is neither a string, nor a number, nor null")
    method, params, why = value.get("method"), value.get("params", _MISSING), None
    if value.get("jsonrpc") != "2.0":
        why = "jsonrpc is not \"2.0\""
    elif method.__class__ is not str:
        why = "the method is no string"
    elif params is _MISSING:
        params = None
    elif params.__class__ is not list and params.__class__ is not dict:
        why = "params is neither an array nor an object"
    if "result" in value or "error" in value:
        why = "it has a method and a result"
    if why is not None:
        return Invalid(None if number is _MISSING else number, InvalidRequest.code, why)
    return Notification(method, params, value) if number is _MISSING else Request(method, params, number, value)


def _judge_response(value):
    number, error, why = value.get("id", _MISSING), value.get("error", _MISSING), None
    if value.get("jsonrpc") != "2.0":
        why = "jsonrpc is not \"2.0\""
    elif number.__class__ not in _ID_TYPES:
        why = "the id is neither a string, nor a number, nor null, or there is none"
    elif error is _MISSING:
        return Response(number, value["result"], None)
    elif "result" in value:
        why = "it has a result and an error"
    elif error.__class__ is not dict or type(error.get("code")) is not int or type(error.get("message")) is not str:
        why = "the error is no object with a code and a message"
    else:
        return Response(number, None, error)
    return Invalid(None, None, why)


def read_message(data, *, max_depth=flowcoro_schema.JSON_DEPTH, max_batch=MAX_BATCH):
    """The event of a message (bytes or str): Request, Notification, Response, Batch or Invalid. Never fails.

    max_depth: arrays and objects in each other. max_batch: members of a batch.
    """
    try:
        value = flowcoro_schema.load_json(data, max_depth=max_depth)
    except flowcoro_schema.JsonError as error:
        return Invalid(None, ParseError.code, str(error))
    if value.__class__ is not list:
        return _judge(value)
    if not value:
        return Invalid(None, InvalidRequest.code, "an empty batch")
    if len(value) > max_batch:
        return Invalid(None, InvalidRequest.code, f"a batch of {len(value)}, where max_batch={max_batch} are allowed")
    return Batch([_judge(member) for member in value])


@functools.lru_cache(1024)
def _json_of_name(name):
    return flowcoro_schema.encode_json(name)


def _json_of_id(number):
    return str(number) if number.__class__ is int else flowcoro_schema.encode_json(number)


def encode_request(method, params=None, id=_MISSING, more=None):
    """A request as bytes; without an id a notification. params: a list, a dict, or None for none.

    more: a dict of members that are not the specification's. ValueError for NaN and infinities, TypeError for what has no JSON.
    """
    given = "" if params is None else f',"params":{flowcoro_schema.encode_json(params)}'
    if id is not _MISSING:
        given += f',"id":{_json_of_id(id)}'
    if more:
        given += "," + flowcoro_schema.encode_json(more)[1:-1]
    return f'{{"jsonrpc":"2.0","method":{_json_of_name(method)}{given}}}'.encode()


def encode_result(id, result):
    """An answer as bytes. ValueError for NaN and infinities, TypeError for what has no JSON."""
    return f'{{"jsonrpc":"2.0","result":{flowcoro_schema.encode_json(result)},"id":{_json_of_id(id)}}}'.encode()


def encode_error(id, code, message, data=None):
    """An answer that is an error, as bytes. Errors as encode_result()."""
    given = "" if data is None else f',"data":{flowcoro_schema.encode_json(data)}'
    return (f'{{"jsonrpc":"2.0","error":{{"code":{code},"message":{flowcoro_schema.encode_json(message)}{given}}},'
            f'"id":{_json_of_id(id)}}}').encode()


# ---- methods --------------------------------------------------------------------------------------------------

class _Method:
    """A function that is called from outside: how parameters are bound to its signature, before it is called."""

    __slots__ = ("name", "function", "wants", "is_async", "is_stream", "fields", "required", "most", "named", "takes_named",
                 "rest", "_checked", "_required_names", "_plain")

    def __init__(self, name, function, said):
        self.name, self.function = name, function
        inner = function
        while isinstance(inner, functools.partial):
            inner = inner.func
        if not inspect.isroutine(inner) and not isinstance(inner, type):
            inner = type(inner).__call__
        self.is_async, self.is_stream = inspect.iscoroutinefunction(inner), inspect.isasyncgenfunction(inner)
        parameters = list(inspect.signature(function).parameters.values())
        hints = _hints(inner, parameters, said)
        self.wants = self._wanted(parameters, hints)
        if self.wants is not None:
            del parameters[0]
        self.fields, self.named, self.rest, self.takes_named = [], {}, None, None       # by place, by name, *rest, **rest
        for parameter in parameters:
            self._add(parameter, hints.get(parameter.name), f"{said}: {parameter.name}")
        self.required = sum(field.default is _MISSING for field in self.fields)
        self.most = len(self.fields) if self.rest is None else math.inf
        self._required_names = [name for name, field in self.named.items() if field.default is _MISSING]
        only_named = [name for name in self._required_names if self.named[name] not in self.fields]
        self._checked = any(not isinstance(field.kind, flowcoro_schema.Anything)
                            for field in (*self.fields, *self.named.values(), self.rest, self.takes_named) if field is not None)
        self._plain = not self._checked and not only_named      # places that are counted, and no more

    @staticmethod
    def _wanted(parameters, hints):
        """"peer" or "context" if the first parameter asks for that."""
        if parameters and parameters[0].kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD):
            hint = hints.get(parameters[0].name)
            if hint is Peer or hint is None and parameters[0].name == "peer":
                return "peer"
            if hint is Context or hint is None and parameters[0].name == "context":
                return "context"
        return None

    def _add(self, parameter, hint, said):
        default = _MISSING if parameter.default is parameter.empty else parameter.default
        kind = flowcoro_schema.Anything() if hint is None else flowcoro_schema.kind_of(hint, said)
        field = flowcoro_schema.Field(parameter.name, kind, flowcoro_schema.description_of(hint), default)
        if parameter.kind is parameter.VAR_POSITIONAL:
            self.rest = field
        elif parameter.kind is parameter.VAR_KEYWORD:
            self.takes_named = field
        else:
            if parameter.kind is not parameter.KEYWORD_ONLY:
                self.fields.append(field)
            if parameter.kind is not parameter.POSITIONAL_ONLY:
                self.named[parameter.name] = field

    def bind(self, params):
        """(list, dict) to call the function with. InvalidParams."""
        if params is None:
            params = []
        if params.__class__ is list and self._plain and self.required <= len(params) <= self.most:
            return params, {}
        errors = flowcoro_schema.Errors(place="params")
        bound = self._bind_places(params, errors) if params.__class__ is list else self._bind_names(params, errors)
        if errors.count:
            raise InvalidParams(errors.first)
        return bound

    def _bind_places(self, params, errors):
        values = []
        for place, value in enumerate(params):
            field = self.fields[place] if place < len(self.fields) else self.rest
            if field is None:
                errors.add((None, place), "no parameter in this place", value)
            else:
                values.append(field.kind.check(value, (None, place), errors))
        for field in self.fields[len(params):self.required]:
            errors.add((None, field.name), field.kind.expected, _MISSING)
        for name in self._required_names:
            if self.named[name] not in self.fields:
                errors.add((None, name), f"{self.named[name].kind.expected}, by its name", _MISSING)
        return values, {}

    def _bind_names(self, params, errors):
        values = {}
        for name, value in params.items():
            field = self.named.get(name, self.takes_named)
            if field is None:
                errors.add((None, name), "no parameter of this name", value)
            else:
                values[name] = field.kind.check(value, (None, name), errors)
        for name in self._required_names:
            if name not in params:
                errors.add((None, name), self.named[name].kind.expected, _MISSING)
        for field in self.fields:
            if field.name not in self.named and field.default is _MISSING:
                errors.add((None, field.name), "to be given by its place", _MISSING)
        return [], values


def _hints(function, parameters, said):
    """{name: annotation}. TypeError when one has a name that is not there."""
    given = {one.name: one.annotation for one in parameters if one.annotation is not one.empty}
    try:
        return typing.get_type_hints(types.SimpleNamespace(__annotations__=given),
                                     getattr(inspect.unwrap(function), "__globals__", {}), include_extras=True)
    except (NameError, SyntaxError) as error:
        raise TypeError(f"{said}: {error}; annotations are looked up in the module of the function") from None


class Methods:
    """What can be called from outside, by name. An RpcServer is one; a client is given one for what the server calls."""

    def __init__(self):
        self._methods = {}

    def method(self, function=None, *, name=None):
        """Decorates a function: `@server.method`, or `@server.method("name")`, and gives it back.

        Async functions, async generators (streams), and plain functions, which are called in the kernel's thread and so must not
        block. A first parameter that is annotated with Peer or Context, or is named peer or context, gets that, and is no
        parameter for the caller. Annotations of the others are checked, see flowcoro_schema.kind_of(). TypeError for what cannot
        be called, and for annotations that no JSON is made into; ValueError for a name that is taken, or begins with "rpc.".
        """
        if isinstance(function, str) or function is None:
            return functools.partial(self.method, name=function or name)
        if not callable(function):
            raise TypeError(f"method({function!r}): give a function")
        name = name or function.__name__
        said = f"method {name!r}"
        if name.startswith("rpc."):
            raise ValueError(f"{said}: names that begin with \"rpc.\" are reserved by JSON-RPC 2.0, section 8")
        if name in self._methods:
            raise ValueError(f"{said} is there already")
        self._methods[name] = _Method(name, function, said)
        return function

    def add(self, thing, *, prefix=""):
        """Add the public methods of an object: each under `prefix` and its name; "math.add" for prefix="math."."""
        for name in dir(thing):
            if not name.startswith("_") and inspect.isroutine(getattr(thing, name)):
                self.method(getattr(thing, name), name=prefix + name)


class Context:
    """What a handler may want to know of its call.

    `peer`: the Peer of the connection, None for a message by itself (HTTP); `method`, `params`, `id` (None for a notification);
    `headers`: dict of str; `state`: a dict for middleware.
    """

    __slots__ = ("peer", "method", "params", "id", "headers", "state")

    def __init__(self, peer, request, headers):
        self.peer, self.method, self.params = peer, request.method, request.params
        self.id = getattr(request, "id", None)
        self.headers, self.state = headers, {}


# ---- transports -----------------------------------------------------------------------------------------------

class _SocketWire:
    """Messages over a Socket."""

    def __init__(self, sock, framing):
        self.sock, self.framing = sock, framing
        self.next_message, self.frame = framing.next_message, framing.frame

    async def read(self):
        """Let the framing have more; whether there was any before the end."""
        data = await self.sock.read(CHUNK)
        if data:
            self.framing.receive_data(data)
            return True
        self.framing.receive_end()
        return False

    def write_nowait(self, frames):
        """Write frames; what is left, as bytes."""
        data = frames[0] if len(frames) == 1 else b"".join(frames)
        sent = self.sock.write_nowait(data)
        return b"" if sent == len(data) else memoryview(data)[sent:]

    async def write(self, data):
        await self.sock.write(data)


# ---- peers ----------------------------------------------------------------------------------------------------

class _Rest:
    """To be awaited: what is left of a coroutine whose first step was made already, and gave `trap`."""

    __slots__ = ("_coro", "_trap", "_run", "_begun")

    def __init__(self, coro, trap, run):
        self._coro, self._trap, self._run, self._begun = coro, trap, run, False

    def __await__(self):
        return self

    def __iter__(self):
        return self

    def __next__(self):
        if self._begun:
            return self._run(self._coro.send, None)
        self._begun = True
        return self._trap

    def send(self, value):
        return self._run(self._coro.send, value)

    def throw(self, *error):
        self._begun = True
        return self._run(self._coro.throw, *error)

    def close(self):
        self._coro.close()


class _Reply:
    """A call of ours, and the task that waits for its answer."""

    __slots__ = ("task", "done", "value", "error", "end")

    def __init__(self):
        self.task = self.value = self.error = None
        self.done = False

    def park(self, task):
        task.park_reason, task.abort_function = "wait for the answer to a call", self._abort
        if self.done:
            flowcoro.reschedule(task)
        else:
            self.task = task

    def _abort(self, task):
        self.task = None
        return True

    @flowcoro.atomic
    def settle(self, value, error):
        self.value, self.error, self.done = value, error, True
        task, self.task = self.task, None
        if task is not None:
            flowcoro.reschedule(task)


class Peer:
    """One end of a connection."""

    def __init__(self, wire, methods):
        self._wire, self._methods = wire, methods
        self._pending, self._numbers = {}, itertools.count(1)
        self._out, self._writing = [], False
        self._group = None
        self._over = flowcoro.Event()
        self._lost = None
        self._wake = flowcoro.ParkingLot("wait for something to send")

    # -- out
    def _flush(self):
        if self._out and not self._writing:
            frames, self._out = self._out, []
            left = self._wire.write_nowait(frames)
            if left:
                self._out.insert(0, bytes(left))
                self._wake.unpark()

    def _post(self, message, at_once):
        self._out.append(self._wire.frame(message))
        if at_once:
            self._flush()
        else:
            self._wake.unpark()

    async def _write(self):
        while True:
            await self._wake.park_unless(lambda: self._out)
            frames, self._out = self._out, []
            self._writing = True
            try:
                await self._wire.write(b"".join(frames))
            finally:
                self._writing = False

    # -- calls
    async def call(self, method, /, *args, params=_MISSING, timeout=CALL_TIMEOUT, **named):
        """Call a method of the peer and return its result."""
        if params is _MISSING:
            params = list(args) if args else named or None
        if self._lost is not None:
            raise ConnectionLost("the connection has ended", False)
        number = next(self._numbers)
        message = encode_request(method, params, number)
        reply = _Reply()
        self._pending[number] = reply
        try:
            self._post(message, len(self._pending) == 1)
            with flowcoro.timeout(timeout):
                await flowcoro.park(reply.park)
        finally:
            self._pending.pop(number, None)
        if reply.error is not None:
            raise reply.error
        return reply.value

    async def notify(self, method, /, *args, params=_MISSING, **named):
        """Send a notification."""
        if params is _MISSING:
            params = list(args) if args else named or None
        self._post(encode_request(method, params), True)
        await flowcoro.checkpoint()

    # -- in
    async def _read(self):
        wire = self._wire
        try:
            while True:
                message = wire.next_message()
                if message is NEED_DATA:
                    self._flush()
                    if not await wire.read():
                        break
                    continue
                rest = self._take(read_message(message))
                if rest is not None:
                    self._group.spawn(self._read(), name="read")
                    await rest
                    return
        except flowcoro_net.NetworkError as error:
            self._lost = error
        self._over.set()

    def _take(self, event):
        if event.__class__ is Response:
            reply = self._pending.pop(event.id, None)
            if reply is not None:
                reply.settle(event.result, event.error and _as_error(event.error))
        elif event.__class__ is Request or event.__class__ is Notification:
            return self._begin(event)
        elif event.__class__ is Invalid:
            kind = _BY_CODE[event.code]
            self._out.append(self._wire.frame(encode_error(event.id, kind.code, kind.message)))

    def _begin(self, request):
        number = getattr(request, "id", _MISSING)
        try:
            plan = self._methods._methods.get(request.method)
            if plan is None:
                raise MethodNotFound
            args, named = plan.bind(request.params)
            if plan.wants:
                args = [self if plan.wants == "peer" else Context(self, request, {}), *args]
            run = contextvars.copy_context().run
            result = run(plan.function, *args, **named)
            if plan.is_async:
                try:
                    trap = run(result.send, None)
                except StopIteration as stop:
                    result = stop.value
                else:
                    return self._finish(number, _Rest(result, trap, run))
            self._answer(number, result)
        except RpcError as error:
            self._fail(number, error)
        except Exception as error:
            self._fail(number, self._internal(error, request.method))

    async def _finish(self, number, rest):
        try:
            self._answer(number, await rest)
        except RpcError as error:
            self._fail(number, error)
        except Exception as error:
            self._fail(number, self._internal(error, "?"))
        self._wake.unpark()

    def _internal(self, error, method):
        reference = str(uuid.uuid4())
        flowcoro_net.report_error(error, f"method {method!r} failed, reference {reference}", "flowcoro_rpc")
        return InternalError({"reference": reference})

    def _answer(self, number, result):
        if number is not _MISSING:
            self._out.append(self._wire.frame(encode_result(number, result)))

    def _fail(self, number, error):
        if number is not _MISSING:
            self._out.append(self._wire.frame(encode_error(number, error.code, error.message, error.data)))

    async def run(self):
        """Serve until the connection ends."""
        try:
            async with flowcoro.TaskGroup(pinned=True) as group:
                self._group = group
                group.spawn(self._read(), name="read")
                group.spawn(self._write(), name="write")
                await self._over.wait()
                group.cancel()
        finally:
            for reply in list(self._pending.values()):
                reply.settle(None, ConnectionLost("the connection has ended before the answer", True))
            self._wire.sock.close_nowait()


# ---- server ---------------------------------------------------------------------------------------------------

class RpcServer(Methods):
    """A server: methods, and connections that call them."""

    async def serve_connection(self, sock, *, framing=Newline):
        """Serve a Socket until it ends."""
        await Peer(_SocketWire(sock, framing()), self).run()

    async def start_tcp_server(self, port, host="127.0.0.1", *, tls=None, framing=Newline):
        """Listen, and serve in the background. Returns the TcpServer."""
        listening = await flowcoro_net.TcpServer.listen(host, port, tls=tls)
        self._listening = listening
        flowcoro.spawn(listening.serve(functools.partial(self.serve_connection, framing=framing)), name="serve RPC")
        return listening

    async def close(self):
        """Close it."""
        self._listening.close()
        await flowcoro.checkpoint()


# ---- client ---------------------------------------------------------------------------------------------------

class RpcClient:
    """A client."""

    def __init__(self):
        raise TypeError("use `await RpcClient.connect(…)`")

    @classmethod
    async def connect(cls, host, port, *, tls=None, framing=Newline, methods=None):
        """Connect."""
        self = cls.__new__(cls)
        sock = await flowcoro_net.Socket.connect(host, port, tls=tls)
        self.peer = Peer(_SocketWire(sock, framing()), methods or Methods())
        self._task = flowcoro.spawn(self.peer.run(), name="RPC client")
        self.call, self.notify = self.peer.call, self.peer.notify
        return self

    async def close(self):
        """Close it."""
        self.peer._over.set()
        await self._task

    async def __aenter__(self):
        return self

    async def __aexit__(self, kind, error, trace):
        await self.close()
