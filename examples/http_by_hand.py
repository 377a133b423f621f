"""A web server in thirty lines: sockets from flowcoro_net, messages from flowcoro_http, and nothing between.

The codec knows what a message is; this program reads and writes. `curl http://127.0.0.1:PORT/` would do as well as the client
at the end.
"""

import flowcoro
import flowcoro_net
from flowcoro_http import (NEED_DATA, PAUSED, ConnectionClosed, EndOfMessage, HttpConnection, ProtocolError, RequestHead,
                           ResponseHead)


async def serve(sock):
    http, request = HttpConnection("server"), None
    while True:
        try:
            event = http.next_event()
        except ProtocolError as error:                  # what is no HTTP is answered, and the connection closed
            await sock.write(http.send_message(ResponseHead(error.status), error.message.encode()))
            return
        if event is NEED_DATA:
            data = await sock.read()
            http.receive_data(data) if data else http.receive_end()
        elif isinstance(event, RequestHead):
            request = event
        elif isinstance(event, EndOfMessage):
            body = f"You have asked for {request.path}\n".encode()
            await sock.write(http.send_message(ResponseHead(200, [("Content-Type", "text/plain; charset=utf-8")]), body))
            if not http.reusable:
                return
            http.start_next_cycle()
        elif isinstance(event, ConnectionClosed) or event is PAUSED:
            return


async def main():
    async with await flowcoro_net.TcpServer.listen("127.0.0.1", 0) as server, flowcoro.TaskGroup() as group:
        group.spawn(server.serve(serve))
        async with await flowcoro_net.Socket.connect(*server.local) as sock:
            for words in b"GET /tea HTTP/1.1\r\nHost: example\r\n\r\n", b"GET /tea HTTP/1.1\nHost: example\n\n":
                await sock.write(words)
                print((await sock.read()).decode())
        server.close()


if __name__ == "__main__":
    flowcoro.run(main())
