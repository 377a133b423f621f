"""No runtime at all: one loop round epoll, by hand. About the least that a server written in Python has to do for `api`.

Run by ../http.py. It takes what one read gives for one request, checks nothing of it, finds what the handler wants where wrk puts
it, and reads and writes JSON with the parts in C of the standard library, whose own functions around them would cost 3 µs more.
"""

import json
import platform
import select
import socket

import harness

read_json = json.JSONDecoder().scan_once
write_json = json.encoder.c_make_encoder(None, None, json.encoder.encode_basestring, None, ":", ",", False, False, False)


def parameters(path):
    match path.split("/"):
        case _, "users", number:
            return {"id": int(number)}
        case _, "users", number, "orders", order:
            return {"id": int(number), "order": int(order)}
        case _, "shops", shop, "items", item:
            return {"shop": shop, "item": item}
        case _, "articles", year, slug:
            return {"year": int(year), "slug": slug}
        case _, "search", kind:
            return {"kind": kind}


def answer(request):
    head, _, content = request.partition(b"\r\n\r\n")
    path, _, query = head[:head.index(b"\r\n")].split(b" ")[1].decode().partition("?")
    query = dict(pair.split("=") for pair in query.split("&"))
    cookie = head.index(b"session=") + len(b"session=")
    session = head[cookie:cookie + len(harness.SESSION)].decode()
    result = harness.answer(parameters(path), query["page"], query["q"].replace("+", " "), session,
                            read_json(content.decode(), 0)[0])
    content = "".join(write_json(result, 0)).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(content), content)


def api():
    listener = harness.listener()
    epoll = select.epoll()
    epoll.register(listener, select.EPOLLIN)
    poll, listens, connections = epoll.poll, listener.fileno(), {}
    while True:
        for fd, _ in poll():
            if fd == listens:
                sock, _ = listener.accept()
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connections[sock.fileno()] = sock
                epoll.register(sock, select.EPOLLIN)
                continue
            sock = connections[fd]
            try:
                request = sock.recv(65_536)
                if not request:
                    raise ConnectionResetError
                sock.sendall(answer(request))
            except ConnectionError:
                del connections[fd]
                sock.close()


if __name__ == "__main__":
    harness.main(dict(api=api), platform.python_version())
