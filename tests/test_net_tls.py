"""TLS: who is trusted, what is not TLS, and how a connection ends; against openssl and the ssl module's own sockets."""

import contextlib
import functools
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time

import pytest

import flowcoro
import flowcoro_net
from flowcoro_net import BrokenError, Socket, TcpServer, TlsError, UnixServer, client_tls, server_tls
from flowcoro_testing import memory_socket_pair, run_in_kernel, wait_all_tasks_parked
from test_net import PATIENCE, drain, nothing_is_left_behind, reset, run, settled, tcp_pair  # noqa: F401  (a fixture)
from test_net_servers import echo

OPENSSL = shutil.which("openssl")

pytestmark = pytest.mark.skipif(OPENSSL is None, reason="the openssl command, which makes the certificates, is not installed")


class Certificates:
    """An authority, and what it signs, made by the openssl command in a directory."""

    def __init__(self, directory):
        self.directory = directory
        self.ca = str(directory / "ca.pem")
        self.openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
                     "-subj", "/CN=test authority", "-addext", "keyUsage=critical,keyCertSign,cRLSign", "-keyout", "ca.key",
                     "-out", "ca.pem")           # Python 3.13 takes no authority that does not say what its key is for
        self.good = self.make("good", "DNS:localhost,IP:127.0.0.1")
        self.other_name = self.make("other", "DNS:other.example")
        self.client = self.make("client", "DNS:client.example")
        self.expired = self.make("expired", "DNS:localhost,IP:127.0.0.1", "-not_before", "20200101000000Z", "-not_after",
                                 "20200102000000Z")

    def openssl(self, *arguments):
        return subprocess.run([OPENSSL, *arguments], cwd=self.directory, check=True, capture_output=True, timeout=PATIENCE)

    def make(self, name, names, *dates):
        """(certificate, key), signed by the authority."""
        said = f"[ext]\nsubjectAltName={names}\nauthorityKeyIdentifier=keyid\nsubjectKeyIdentifier=hash\n"
        (self.directory / f"{name}.ext").write_text(said)
        self.openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", f"/CN={name}",
                     "-keyout", f"{name}.key", "-out", f"{name}.csr")
        if dates:           # `x509` has no dates in older versions, `ca` has
            (self.directory / "index.txt").write_text("")
            (self.directory / "serial").write_text("77\n")
            (self.directory / "ca.cnf").write_text(
                "[ca]\ndefault_ca=d\n[d]\ndatabase=index.txt\nserial=serial\nnew_certs_dir=.\ndefault_md=sha256\npolicy=p\n"
                f"[p]\ncommonName=supplied\n{said}")
            self.openssl("ca", "-batch", "-config", "ca.cnf", "-cert", "ca.pem", "-keyfile", "ca.key", "-in", f"{name}.csr",
                         "-out", f"{name}.pem", "-extensions", "ext", "-notext", "-startdate", dates[1], "-enddate", dates[3])
        else:
            self.openssl("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial",
                         "-days", "2", "-extfile", f"{name}.ext", "-extensions", "ext", "-out", f"{name}.pem")
        return str(self.directory / f"{name}.pem"), str(self.directory / f"{name}.key")


@pytest.fixture(scope="session")
def certificates(tmp_path_factory):
    return Certificates(tmp_path_factory.mktemp("certificates"))


@contextlib.asynccontextmanager
async def served(handler, context, **options):
    """A server with TLS on a free port, served until the block ends."""
    async with await TcpServer.listen("127.0.0.1", 0, tls=context) as server, flowcoro.TaskGroup() as group:
        group.spawn(server.serve(handler, **options))
        yield server
        server.close()


async def tls_pair(certificates, client=None, server=None):
    """Two Sockets that have TLS between them."""
    one, other = tcp_pair()
    near, far = Socket(one), Socket(other)
    try:
        async with flowcoro.TaskGroup() as group:
            group.spawn(near.start_tls(client or client_tls(ca=certificates.ca), server_name="localhost"))
            group.spawn(far.start_tls(server or server_tls(*certificates.good), server_side=True))
    except BaseException:
        near.close_nowait()
        far.close_nowait()
        raise
    return near, far


# ---- talking ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_tls_echo_with_all_kinds_of_reads_and_writes(certificates, version, tmp_path):
    context = client_tls(ca=certificates.ca)
    context.minimum_version = context.maximum_version = version
    path = tmp_path / "file"
    path.write_bytes(b"content of a file")

    async def main():
        async with served(echo, server_tls(*certificates.good)) as server:
            async with await Socket.connect("127.0.0.1", server.local[1], tls=context) as sock:
                assert sock.tls.version() == {"TLSv1_2": "TLSv1.2", "TLSv1_3": "TLSv1.3"}[version.name]
                assert sock.statistics()["tls"] == sock.tls.version()
                await sock.write(b"hello")
                assert await sock.read() == b"hello"
                await sock.write_many([b"line\n", b"", bytearray(b"and "), b"rest"])
                assert await sock.read_until() == b"line\n"
                assert await sock.read_exactly(8) == b"and rest"
                await sock.write_many([b"x" * 200_000, b"y" * 200_000])
                assert await sock.read_exactly(400_000) == b"x" * 200_000 + b"y" * 200_000
                with open(path, "rb") as file:
                    assert await sock.send_file(file, 3) == 14
                    buffer = bytearray(100)
                    assert await sock.read_into(buffer) == 14 and buffer[:14] == b"tent of a file"
                    assert await sock.send_file(file, 3, head=b"con") == 14
                assert await sock.read_exactly(17) == b"content of a file"
                await sock.write(b"")

    run(main)


def test_a_megabyte_each_way_at_once(certificates):
    data = bytes(range(256)) * 4096

    async def main():
        near, far = await tls_pair(certificates)
        async with near, far, flowcoro.TaskGroup() as group:
            group.spawn(near.write(data))
            group.spawn(far.write(data[::-1]))
            one, other = group.spawn(near.read_exactly(len(data))), group.spawn(far.read_exactly(len(data)))
            assert await other == data and await one == data[::-1]

    run(main)


def test_several_workers_share_a_tls_connection(certificates):
    data = bytes(range(256)) * 1024

    async def main():
        async with served(echo, server_tls(*certificates.good)) as server:
            async def client():
                async with await Socket.connect("127.0.0.1", server.local[1], tls=client_tls(ca=certificates.ca)) as sock:
                    async with flowcoro.TaskGroup() as group:
                        reader = group.spawn(sock.read_exactly(len(data)))
                        for start in range(0, len(data), 5000):
                            await sock.write(data[start:start + 5000])
                        assert await reader == data

            async with flowcoro.TaskGroup() as group:
                for _ in range(8):
                    group.spawn(client())

    run(main, workers=3)


def test_no_two_workers_are_in_one_tls_connection_at_once(certificates):
    """OpenSSL forbids it, and would crash, sometimes."""
    class Watched:
        def __init__(self, inner):
            self.inner, self.inside, self.overlaps, self.calls = inner, 0, 0, 0

        def __getattr__(self, name):
            method = getattr(self.inner, name)
            if name not in ("read", "write", "pending"):
                return method

            def watched(*args):
                self.calls += 1
                self.inside += 1
                time.sleep(0.001)           # another worker goes on
                self.overlaps += self.inside > 1
                try:
                    return method(*args)
                finally:
                    self.inside -= 1
            return watched

    async def main():
        near, far = await tls_pair(certificates)
        near._tls.object = watched = Watched(near._tls.object)
        async with near, far, flowcoro.TaskGroup() as group:
            group.spawn(echo(far))

            async def read():
                for _ in range(100):
                    await near.read_exactly(10)

            reader = group.spawn(read())
            for _ in range(100):
                await near.write(b"0123456789")
            await reader
            await near.shutdown_write()
        assert watched.calls > 200 and watched.overlaps == 0

    run(main, workers=3)


def test_tls_over_a_unix_socket(certificates, tmp_path):
    async def main():
        async with await UnixServer.listen(tmp_path / "socket", tls=server_tls(*certificates.good)) as server, \
                flowcoro.TaskGroup() as group:
            group.spawn(server.serve(echo))
            context = client_tls(ca=certificates.ca)
            async with await Socket.connect_unix(tmp_path / "socket", tls=context, server_name="localhost") as sock:
                await sock.write(b"hello")
                assert await sock.read() == b"hello"
            with pytest.raises(ValueError, match="give server_name="):
                await Socket.connect_unix(tmp_path / "socket", tls=context)
            server.close()

    run(main)


def test_tls_in_memory(certificates):
    async def main():
        near, far = memory_socket_pair(Socket, capacity=1000)
        async with near, far, flowcoro.TaskGroup() as group:
            group.spawn(near.start_tls(client_tls(ca=certificates.ca), server_name="localhost"))
            await far.start_tls(server_tls(*certificates.good), server_side=True)
            group.spawn(near.write(b"x" * 100_000))
            assert await far.read_exactly(100_000) == b"x" * 100_000

    run(main)


# ---- who is who ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("which, said", [("expired", "certificate has expired"), ("other_name", "127.0.0.1")])
def test_a_certificate_that_is_expired_or_for_another_name_is_refused(certificates, which, said):
    async def main():
        async with served(echo, server_tls(*getattr(certificates, which))) as server:
            with pytest.raises(TlsError, match=rf"the TLS handshake failed: the certificate is not trusted: .*{said}") as caught:
                await Socket.connect("127.0.0.1", server.local[1], tls=client_tls(ca=certificates.ca))
            assert caught.value.reason == "CERTIFICATE_VERIFY_FAILED"
            while not server.statistics()["handshakes_failed"]:
                await flowcoro.sleep(0.001)

    run(main)


def test_an_authority_that_is_unknown_is_refused_by_default_and_verify_off_takes_anybody(certificates, reports):
    async def main():
        async with served(echo, server_tls(*certificates.good)) as server:
            for tls in True, client_tls():
                with pytest.raises(TlsError, match="not trusted: .*certificate.*give client_tls\\(ca=…\\)"):
                    await Socket.connect("127.0.0.1", server.local[1], tls=tls)
            async with await Socket.connect("127.0.0.1", server.local[1], tls=client_tls(verify=False)) as sock:
                await sock.write(b"x")
                assert await sock.read() == b"x"

    run(main)
    assert reports == []        # what clients do wrong is no error of the server's


def test_the_name_asked_for_reaches_the_server_and_chooses_the_certificate(certificates):
    context, other = server_tls(*certificates.good), server_tls(*certificates.other_name)
    asked = []

    def choose(tls, name, first):
        asked.append(name)
        if name == "other.example":
            tls.context = other

    context.sni_callback = choose

    async def main():
        async with served(echo, context) as server:
            for name in "localhost", "other.example":
                async with await Socket.connect("127.0.0.1", server.local[1], tls=client_tls(ca=certificates.ca),
                                                server_name=name) as sock:
                    assert ("DNS", name) in sock.tls.getpeercert()["subjectAltName"]
            assert asked == ["localhost", "other.example"]

    run(main)


@pytest.mark.parametrize("ours, theirs, agreed", [
    (["h2", "http/1.1"], ["http/1.1", "h2"], "http/1.1"), (["h2"], ["spdy/1"], None), ([], ["h2"], None)])
def test_a_protocol_is_agreed_upon(certificates, ours, theirs, agreed):
    chosen = []

    async def handler(sock):
        chosen.append(sock.alpn)

    async def main():
        async with served(handler, server_tls(*certificates.good, alpn=theirs)) as server:
            context = client_tls(ca=certificates.ca, alpn=ours)
            async with await Socket.connect("127.0.0.1", server.local[1], tls=context) as sock:
                assert sock.alpn == agreed
                assert await sock.read() == b""
        assert chosen == [agreed]

    run(main)


def test_a_server_may_ask_for_certificates_of_clients(certificates):
    seen = []

    async def handler(sock):
        seen.append(sock.tls.getpeercert()["subjectAltName"])
        await echo(sock)

    async def main():
        async with served(handler, server_tls(*certificates.good, client_ca=certificates.ca)) as server:
            mine = client_tls(ca=certificates.ca, certificate=certificates.client[0], key=certificates.client[1])
            async with await Socket.connect("127.0.0.1", server.local[1], tls=mine) as sock:
                await sock.write(b"x")
                assert await sock.read() == b"x"
            assert seen == [(("DNS", "client.example"),)]
            with pytest.raises(flowcoro_net.NetworkError, match="the peer refuses: .*certificate|lost"):
                async with await Socket.connect("127.0.0.1", server.local[1], tls=client_tls(ca=certificates.ca)) as sock:
                    await sock.read()           # with TLS 1.3 the refusal comes after the client's handshake
            assert len(seen) == 1

    run(main)


def test_contexts_refuse_nonsense_and_say_which(certificates):
    good, key = certificates.good
    for make, error, said in (
            (lambda: client_tls(key="x"), ValueError, "key= needs certificate="),
            (lambda: client_tls(alpn="h2"), TypeError, "alpn='h2': give a list"),
            (lambda: client_tls(alpn=5), TypeError, "alpn=5: give a list"),
            (lambda: client_tls(alpn=[b"x"]), TypeError, "alpn=.b'x'.: give a list"),
            (lambda: client_tls(alpn=[""]), TypeError, "give a list"),
            (lambda: client_tls(ca="/no/such/file"), FileNotFoundError, "ca='/no/such/file': No such file"),
            (lambda: client_tls(ca=5), TypeError, "ca=5: give the path"),
            (lambda: client_tls(ca=key), ssl.SSLError, "ca='.*good.key': .*PEM"),
            (lambda: server_tls("/no/such/file"), FileNotFoundError, "certificate='/no/such/file', key=None: No such file"),
            (lambda: server_tls(good, certificates.client[1]), ssl.SSLError, "good.pem', key='.*client.key': .*PEM"),
            (lambda: server_tls(good, key, client_ca="/no/such/file"), FileNotFoundError, "client_ca='/no/such/file'")):
        with pytest.raises(error, match=said):
            make()
    for context in client_tls(ca=certificates.directory), client_tls(), server_tls(good, key):
        assert context.options & ssl.OP_NO_RENEGOTIATION and context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert client_tls(ca=certificates.directory).verify_mode == ssl.CERT_REQUIRED


def test_a_context_of_the_other_side_and_a_name_without_tls_are_refused_before_anything_is_sent(certificates):
    async def main():
        for wrong, error in (client_tls(), ValueError), (True, TypeError), (5, TypeError):
            with pytest.raises(error, match="tls=.*as server_tls"):
                await TcpServer.listen("127.0.0.1", 0, tls=wrong)
        with pytest.raises(ValueError, match="is for servers: give one as client_tls"):
            await Socket.connect("127.0.0.1", 9, tls=server_tls(*certificates.good))
        for connect in functools.partial(Socket.connect, "127.0.0.1", 9), functools.partial(Socket.connect_unix, "path"):
            with pytest.raises(ValueError, match="server_name='x' is for TLS alone"):
                await connect(server_name="x")
            with pytest.raises(TypeError, match="server_name=5: give the name"):
                await connect(server_name=5, tls=True)
            for name in "", "x" * 300, "a..b", "zero\0":
                with pytest.raises(ValueError, match="server_name=.*this is no name of a host"):
                    await connect(server_name=name, tls=True)

    run(main)


# ---- what is not TLS -------------------------------------------------------------------------------------------

def test_a_plain_client_on_a_tls_port_is_counted_and_harms_nobody(certificates, reports):
    async def main():
        async with served(echo, server_tls(*certificates.good)) as server:
            with socket.create_connection(server.local, timeout=PATIENCE) as plain:
                plain.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                await flowcoro.to_thread(drain, plain)
            assert server.statistics()["handshakes_failed"] == 1
            async with await Socket.connect("127.0.0.1", server.local[1], tls=client_tls(ca=certificates.ca)) as sock:
                await sock.write(b"x")
                assert await sock.read() == b"x"

    run(main)
    assert reports == []


def test_the_alert_is_sent_also_when_a_write_makes_the_handshake(certificates):
    old = client_tls(ca=certificates.ca)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    new = server_tls(*certificates.good)
    new.minimum_version = ssl.TLSVersion.TLSv1_3

    async def main():
        async with await TcpServer.listen("127.0.0.1", 0, tls=new) as server, flowcoro.TaskGroup() as group:
            async def client():
                with pytest.raises(TlsError, match="the peer refuses: .*protocol version"):
                    await Socket.connect("127.0.0.1", server.local[1], tls=old)

            group.spawn(client())
            async with await server.accept() as sock:
                with pytest.raises(TlsError, match="unsupported protocol|UNSUPPORTED_PROTOCOL|does not speak TLS"):
                    await sock.write(b"x")

    run(main)


def test_a_tls_client_on_a_plain_port_is_told_that_the_peer_speaks_none():
    async def handler(sock):
        await sock.read()
        await sock.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    async def main():
        async with await TcpServer.listen("127.0.0.1", 0) as server, flowcoro.TaskGroup() as group:
            group.spawn(server.serve(handler))
            with pytest.raises(TlsError, match="the peer does not speak TLS here"):
                await Socket.connect(*server.local, tls=client_tls(verify=False))
            server.close()

    run(main)


def test_a_peer_that_closes_or_resets_during_the_handshake_is_an_error_that_says_so():
    async def main():
        with socket.create_server(("127.0.0.1", 0)) as server:
            async with flowcoro.TaskGroup() as group:
                async def connect(kind, said):
                    with pytest.raises(kind, match=said):
                        await Socket.connect(*server.getsockname(), tls=client_tls(verify=False))

                task = await settled(group, connect(TlsError, "the peer closed the connection"))
                far, _ = server.accept()
                far.recv(100_000)
                far.close()
                await task
                task = await settled(group, connect(BrokenError, "lost while reading"))
                reset(server.accept()[0])
                await task
        assert flowcoro.statistics()["descriptors"] == 0

    run(main)


def test_a_client_that_says_nothing_is_let_go_after_the_handshake_timeout(certificates):
    async def main():
        async with served(echo, server_tls(*certificates.good), handshake_timeout=0.05) as server:
            with socket.create_connection(server.local, timeout=PATIENCE) as silent:
                async with await Socket.connect("127.0.0.1", server.local[1], tls=client_tls(ca=certificates.ca)) as sock:
                    await sock.write(b"x")
                    assert await sock.read() == b"x"        # nobody waits for the silent one
                assert await flowcoro.to_thread(drain, silent) == b""
            assert server.statistics()["handshakes_failed"] == 1

    run(main)


def test_a_handshake_that_takes_too_long_for_a_client():
    async def main():
        with socket.create_server(("127.0.0.1", 0)) as server:
            with pytest.raises(TimeoutError, match="took longer than timeout=0.03 s"):
                await Socket.connect(*server.getsockname(), tls=client_tls(verify=False), timeout=0.03)
            one, other = tcp_pair()
            with other:
                async with Socket(one) as near:
                    with pytest.raises(TimeoutError, match="the TLS handshake was not done within 0.03 s"):
                        await near.start_tls(client_tls(verify=False), timeout=0.03)

    run(main)


# ---- STARTTLS --------------------------------------------------------------------------------------------------

def test_start_tls_after_plain_talk(certificates):
    async def handler(sock):
        assert await sock.read_until() == b"STARTTLS\n"
        await sock.write(b"go\n")
        await sock.start_tls(server_tls(*certificates.good), server_side=True)
        await echo(sock)

    async def main():
        async with await TcpServer.listen("127.0.0.1", 0) as server, flowcoro.TaskGroup() as group:
            group.spawn(server.serve(handler))
            async with await Socket.connect(*server.local) as sock:
                await sock.write(b"STARTTLS\n")
                assert await sock.read_until() == b"go\n"
                await sock.start_tls(client_tls(ca=certificates.ca), server_name="localhost")
                await sock.write(b"secret")
                assert await sock.read() == b"secret"
                with pytest.raises(RuntimeError, match="speaks TLS already"):
                    await sock.start_tls(server_name="localhost")
            server.close()

    run(main)


def test_what_was_sent_before_tls_began_is_not_taken_for_what_is_inside(certificates):
    async def main():
        one, other = tcp_pair()
        with other:
            async with Socket(one) as near:
                other.sendall(b"go\nDELETE ALL\n")
                assert await near.read_until() == b"go\n"
                with pytest.raises(TlsError, match="11 bytes came before TLS began"):
                    await near.start_tls(client_tls(ca=certificates.ca), server_name="localhost")
                for wrong in None, 5:
                    with pytest.raises(TypeError):
                        await near.start_tls(wrong, server_name="localhost")

    run(main)


def test_start_tls_waits_for_no_reader():
    async def main():
        one, other = tcp_pair()
        with other:
            async with Socket(one) as near, flowcoro.TaskGroup() as group:
                reader = await settled(group, near.read())
                with pytest.raises(flowcoro.BusyError):
                    await near.start_tls(client_tls(verify=False))
                reader.cancel()

    run(main)


# ---- ends ------------------------------------------------------------------------------------------------------

@pytest.fixture(params=["strict", "lenient"])
def end_contexts(request, certificates):
    """(client's, server's) ssl.SSLContext. `lenient`: OpenSSL is told, as most contexts tell it, to take a cut for an end."""
    contexts = client_tls(ca=certificates.ca), server_tls(*certificates.good)
    option = getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
    if request.param == "lenient" and not option:
        pytest.skip("this OpenSSL cannot ignore a cut")
    for context in contexts:
        context.options = context.options | option if request.param == "lenient" else context.options & ~option
    return contexts


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_a_goodbye_is_an_end_and_a_cut_is_broken(certificates, end_contexts, version):
    end_contexts[0].maximum_version = ssl.TLSVersion[version]

    async def main():
        near, far = await tls_pair(certificates, *end_contexts)
        async with near:
            await far.write(b"all")
            await far.close()
            assert await near.read_exactly(3) == b"all"
            assert await near.read() == b"" and await near.read() == b""
        near, far = await tls_pair(certificates, *end_contexts)
        async with near:
            await far.write(b"some of it")
            far.close_nowait()
            assert await near.read() == b"some of it"
            for _ in range(2):
                with pytest.raises(BrokenError, match="cut without a TLS goodbye"):
                    await near.read()

    run(main)


def test_after_our_goodbye_the_peers_is_an_end_and_a_cut_is_broken(certificates, end_contexts):
    async def main():
        for said in True, False:
            for read_before in True, False:
                near, far = await tls_pair(certificates, *end_contexts)
                async with near:
                    await far.write(b"answer")
                    if said:
                        await far.shutdown_write()
                    else:
                        far.raw.shutdown(socket.SHUT_WR)
                    if read_before:
                        assert await near.read() == b"answer"
                    await near.shutdown_write()         # it decrypts what has come, the peer's goodbye too
                    if not read_before:
                        assert await near.read() == b"answer"
                    if said:
                        assert await near.read() == b"" and await near.read() == b""
                    else:
                        with pytest.raises(BrokenError, match="cut without a TLS goodbye"):
                            await near.read()
                far.close_nowait()

    run(main)


def test_a_peer_that_ends_in_the_handshake_is_no_end(certificates, end_contexts):
    async def main():
        one, other = tcp_pair()
        async with Socket(one) as near:
            other.close()
            with pytest.raises(TlsError, match="the peer closed the connection"):
                await near.start_tls(end_contexts[0], server_name="localhost")

    run(main)


@pytest.mark.parametrize("waits", [False, True], ids=["nobody_reads", "somebody_waits"])
@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_what_a_client_has_written_arrives_though_it_has_read_nothing(certificates, version, waits):
    context, data = client_tls(ca=certificates.ca), os.urandom(1 << 20)
    context.maximum_version = ssl.TLSVersion[version]
    got = []

    async def read_the_end(sock):
        with contextlib.suppress(flowcoro.ClosedError):     # with TLS 1.2 close() has nothing to wait for
            assert await sock.read() == b""

    async def slow(sock):
        await flowcoro.sleep(0.01)          # so that all of the client's close is over, if it waits for nothing
        while len(got) < len(data) // 2**14:
            got.append(await sock.read_exactly(2**14))
        assert await sock.read() == b""

    async def main():
        async with served(slow, server_tls(*certificates.good)) as server:
            async with flowcoro.TaskGroup() as group:
                async with await Socket.connect("127.0.0.1", server.local[1], tls=context) as sock:
                    if waits:
                        group.spawn(read_the_end(sock))
                        await flowcoro.checkpoint()         # it has begun, and the server's tickets are not yet there
                    await sock.write(data)
            while not server.statistics()["accepted"] or server.statistics()["connections"]:
                await flowcoro.sleep(0.001)
            assert b"".join(got) == data
            assert server.statistics()["broken"] == 0

    run(main)


@pytest.mark.parametrize("closes", [2, 3])
def test_a_second_close_does_not_cut_short_the_first(certificates, closes):
    data = os.urandom(1 << 20)

    async def main():
        near, far = await tls_pair(certificates)
        async with flowcoro.TaskGroup() as group:
            async def peer():
                await flowcoro.sleep(0.01)
                assert await far.read_exactly(len(data)) == data
                assert await far.read() == b""
                await far.close()

            group.spawn(peer())
            await near.write(data)
            for _ in range(closes):
                group.spawn(near.close())
        assert near.closed

    run(main)


def test_who_reads_while_a_close_waits_is_told_that_it_is_closed(certificates):
    async def main():
        near, far = await tls_pair(certificates)
        async with far, flowcoro.TaskGroup() as group:
            closing = await settled(group, near.close())
            assert not closing.done()
            for operation in near.read(), near.write(b"x"), near.read_until():
                with pytest.raises(flowcoro.ClosedError):
                    await operation
            await far.close()

    run(main)


def test_a_client_waits_for_no_end_once_it_has_heard_something_and_not_for_long(certificates, monkeypatch):
    monkeypatch.setattr(flowcoro_net, "CLOSE_TIMEOUT", 0.05)

    async def main():
        for heard in True, False:
            near, far = await tls_pair(certificates)
            async with far:
                await far.write(b"x" if heard else b"")
                if heard:
                    assert await near.read() == b"x"
                    flowcoro_net.CLOSE_TIMEOUT = PATIENCE * 2
                await near.close()
                flowcoro_net.CLOSE_TIMEOUT = 0.05
                assert near.closed and await far.read() == b""

    run(main)


def test_a_long_write_to_a_peer_that_takes_all_lets_the_other_tasks_run(certificates):
    async def main():
        near, far = await tls_pair(certificates)
        async with far, near, flowcoro.TaskGroup() as group:
            near._send = lambda view, flags: len(view)
            other = group.spawn(flowcoro.checkpoint())
            await near.write(bytes(flowcoro_net.TLS_CHUNK * 300))
            assert other.done()
            near.close_nowait()

    run(main)


def test_many_small_pieces_share_records_and_let_the_other_tasks_run(certificates):
    pieces = [b"x"] * 200_000 + [b"y" * 100_000] * 8 + [b"z"] * 3
    count = sum(map(len, pieces))

    async def main():
        near, far = await tls_pair(certificates)
        async with far, near, flowcoro.TaskGroup() as group:
            calls, send = [], near._send
            near._send = lambda view, flags: calls.append(1) or send(view, flags)
            reader = group.spawn(far.read_exactly(count))
            await near.write_many(pieces)
            assert await reader == b"".join(pieces)
            assert near.statistics()["bytes_sent"] < count * 1.01
            calls.clear()
            near._send = lambda view, flags: calls.append(1) or len(view)           # a peer that takes all
            other = group.spawn(flowcoro.checkpoint())
            await near.write_many([bytes(flowcoro_net.TLS_CHUNK)] * 300)
            assert len(calls) == 300 and other.done()
            near.close_nowait()

    run(main)


def test_a_cancelled_goodbye_is_the_end_of_writing_and_not_of_reading(certificates):
    async def main():
        near, far = await tls_pair(certificates)
        async with far, near:
            send, near._send = near._send, lambda view, flags: (_ for _ in ()).throw(BlockingIOError())
            with flowcoro.move_on_after(0.01) as scope:
                await near.shutdown_write()
            assert scope.cancelled_caught
            near._send, near._pollable.writable = send, True
            with pytest.raises(flowcoro.ClosedError, match="writing was shut down here"):
                await near.write(b"more")
            await far.write(b"still read")
            assert await near.read() == b"still read"
            await near.shutdown_write()
            assert await far.read() == b""

    run(main)


@pytest.mark.parametrize("step", ["_decrypt", "_shake"])
def test_a_peer_that_sends_records_without_data_lets_the_other_tasks_run(certificates, monkeypatch, step):
    steps = [0]

    def wants_more(self, *args):
        steps[0] += 1
        if steps[0] == 300:
            raise ssl.SSLError("enough")
        raise ssl.SSLWantReadError

    async def main():
        near, far = await tls_pair(certificates)
        async with flowcoro.TaskGroup() as group:
            monkeypatch.setattr(flowcoro_net._Tls, step, wants_more)
            near._recv = lambda max_bytes: b"x" * max_bytes                 # there always is more
            near._pollable.readable = True
            near._tls.is_done = step == "_decrypt"
            other = group.spawn(flowcoro.checkpoint())
            with pytest.raises(TlsError, match="enough"):
                await near.read()
            assert other.done()
            near.close_nowait()
            far.close_nowait()

    run(main)


def test_half_close_with_tls(certificates):
    async def main():
        near, far = await tls_pair(certificates)
        async with near, far:
            await far.write(b"x" * 50_000)          # under way while the goodbye goes the other way
            assert await near.read(10) == b"x" * 10         # of several records that have come at once
            await near.write(b"question")
            await near.shutdown_write()
            await near.shutdown_write()
            assert await far.read() == b"question"
            assert await far.read() == b""
            await far.write(b"answer")
            assert near.statistics()["bytes_buffered"]
            assert await near.read_exactly(49_996) == b"x" * 49_990 + b"answer"
            with pytest.raises(flowcoro.ClosedError):
                await near.write(b"x")
            await far.close()
            assert await near.read() == b""

    run(main)


def test_close_does_not_wait_for_a_peer_that_takes_nothing(certificates, monkeypatch):
    monkeypatch.setattr(flowcoro_net, "CLOSE_TIMEOUT", 0.02)

    async def main():
        near, far = await tls_pair(certificates)
        async with flowcoro.TaskGroup() as group:
            writer = await settled(group, near.write(bytes(32 << 20)))
            writer.cancel()
            await wait_all_tasks_parked()
            await near.close()
            assert near.closed
            far.close_nowait()

    run(main)


def test_after_a_cancelled_write_the_stream_is_still_one(certificates):
    async def main():
        near, far = await tls_pair(certificates)
        data = bytes(range(256)) * 2**17
        async with near, far, flowcoro.TaskGroup() as group:
            writer = await settled(group, near.write(data))
            writer.cancel()
            await wait_all_tasks_parked()
            found = bytearray()

            async def read():
                while not found.endswith(b"the end of it"):
                    found.extend(await far.read())

            group.spawn(read())
            await near.write(b"the end of it")
        assert bytes(found[:-13]) == data[:len(found) - 13] and len(found) < len(data)

    run(main)


def test_a_cancelled_handshake_can_be_gone_on_with(certificates):
    async def main():
        one, other = tcp_pair()
        near, far = Socket(one), Socket(other)
        async with near, far:
            with flowcoro.move_on_after(0.01) as scope:
                await near.start_tls(client_tls(ca=certificates.ca), server_name="localhost")
            assert scope.cancelled_caught
            async with flowcoro.TaskGroup() as group:
                group.spawn(far.start_tls(server_tls(*certificates.good), server_side=True))
                await near.handshake()
            await near.write(b"x")
            assert await far.read() == b"x"

    run(main)


def test_a_reader_and_a_writer_that_come_together_make_one_handshake(certificates):
    async def main():
        async with await TcpServer.listen("127.0.0.1", 0, tls=server_tls(*certificates.good)) as server, \
                flowcoro.TaskGroup() as group:
            client = group.spawn(Socket.connect("127.0.0.1", server.local[1], tls=client_tls(ca=certificates.ca)))
            async with await server.accept() as far:
                reader = group.spawn(far.read())
                await far.write(b"from the server")
                async with await client as near:
                    assert await near.read() == b"from the server"
                    await near.write(b"from the client")
                    assert await reader == b"from the client"

    run(main)


# ---- faults ----------------------------------------------------------------------------------------------------

async def relayed(context, theirs, relay):
    """(near, far): Sockets with TLS whose bytes pass through `relay(source, target)`, one call for each way."""
    near, one = (Socket(each) for each in tcp_pair())
    far, other = (Socket(each) for each in tcp_pair())
    relaying = [flowcoro.spawn(relay(one, other)), flowcoro.spawn(relay(other, one))]
    async with flowcoro.TaskGroup() as group:
        group.spawn(near.start_tls(context, server_name="localhost"))
        group.spawn(far.start_tls(theirs, server_side=True))
    return near, far, one, other, relaying


def test_records_that_come_one_byte_at_a_time_are_read_as_any_other(certificates):
    async def relay(source, target):
        with contextlib.suppress(flowcoro.ClosedError, BrokenError):
            while data := await source.read(1):
                await target.write(data)

    async def main():
        near, far, *others, relaying = await relayed(client_tls(ca=certificates.ca), server_tls(*certificates.good), relay)
        async with near, far, others[0], others[1], flowcoro.TaskGroup() as group:
            group.spawn(near.write(b"line\nand more"))
            assert await far.read_until() == b"line\n" and await far.read_exactly(8) == b"and more"
            await far.close()
            assert await near.read() == b""
            for task in relaying:
                task.cancel()

    run(main)


@pytest.mark.parametrize("damage", ["changed", "repeated", "cut"])
def test_who_meddles_with_records_is_found_out(certificates, damage):
    """A byte that is changed, a record that comes twice (RFC 8446 section 5.2), and half a record before the end."""
    meddle = [False]

    async def relay(source, target):
        with contextlib.suppress(flowcoro.ClosedError, BrokenError):
            while data := await source.read():
                if meddle[0] and damage == "changed":
                    data = data[:-1] + bytes([data[-1] ^ 1])
                if meddle[0] and damage == "repeated":
                    data *= 2
                if meddle[0] and damage == "cut":
                    data = data[:-1]
                await target.write(data)
                if meddle[0] and damage == "cut":
                    await target.close()

    async def main():
        near, far, *others, relaying = await relayed(client_tls(ca=certificates.ca), server_tls(*certificates.good), relay)
        async with far, others[0], others[1]:
            await near.write(b"well")
            assert await far.read() == b"well"
            meddle[0] = True
            await near.write(b"harmed")
            kind, said = (BrokenError, "cut without a TLS goodbye") if damage == "cut" else (TlsError, "TLS failed")
            if damage == "repeated":
                assert await far.read() == b"harmed"
            for _ in range(2):
                with pytest.raises(kind, match=said):
                    await far.read()
            if damage != "cut":
                with pytest.raises(TlsError):
                    await far.write(b"to nobody")
            near.close_nowait()
            for task in relaying:
                task.cancel()

    run(main)


def test_a_reset_of_a_tls_connection_is_broken_and_stays_so(certificates):
    async def main():
        near, far = await tls_pair(certificates)
        async with near:
            await near.write(b"unread")
            while not far._pollable.readable:
                await flowcoro.sleep(0)
            reset(far.raw)
            far.close_nowait()
            for _ in range(2):
                with pytest.raises(BrokenError, match="lost while reading"):
                    await near.read()
            with pytest.raises(BrokenError):
                for _ in range(1000):
                    await near.write(b"x")

    run(main)


def test_a_peer_that_never_reads_makes_a_tls_write_wait_and_memory_stays_bounded(certificates):
    import tracemalloc

    async def main():
        near, far = await tls_pair(certificates)
        data = bytes(64 << 20)
        async with far, near, flowcoro.TaskGroup() as group:
            tracemalloc.start()
            try:
                writer = await settled(group, near.write(data))
                assert tracemalloc.get_traced_memory()[1] < 8 << 20
            finally:
                tracemalloc.stop()
            assert writer.state == "parked" and near.statistics()["bytes_sent"] < len(data)
            writer.cancel()
            near.close_nowait()         # a goodbye would wait for the peer

    run(main)


def test_a_second_reader_or_writer_of_a_tls_connection_is_told_that_it_is_busy(certificates):
    async def main():
        near, far = await tls_pair(certificates)
        async with far, near, flowcoro.TaskGroup() as group:
            reader = await settled(group, near.read())
            writer = await settled(group, near.write(bytes(32 << 20)))
            for again in near.read(), near.read_until(), near.write(b"x"), near.shutdown_write():
                with pytest.raises(flowcoro.BusyError):
                    await again
            reader.cancel()
            writer.cancel()
            near.close_nowait()

    run(main)


def test_close_wakes_who_reads_and_writes_with_tls(certificates):
    async def main():
        near, far = await tls_pair(certificates)
        async with far, flowcoro.TaskGroup() as group:
            async def told(coro):
                with pytest.raises(flowcoro.ClosedError):
                    await coro

            await settled(group, told(near.read()))
            await settled(group, told(near.write(bytes(32 << 20))))
            await near.close()

    run(main)


def test_a_name_loses_its_final_dot_and_its_zone_before_it_is_asked_for():
    assert [flowcoro_net._name_for_tls(name) for name in ("host.example.", b"host.example", "fe80::1%eth0", None, "")] == [
        "host.example", "host.example", "fe80::1", None, ""]


# ---- foreign counterparts --------------------------------------------------------------------------------------

def test_openssl_s_client_is_echoed(certificates):
    async def main():
        async with served(echo, server_tls(*certificates.good, alpn=["echo"])) as server:
            command = [OPENSSL, "s_client", "-connect", f"127.0.0.1:{server.local[1]}", "-CAfile", certificates.ca, "-quiet",
                       "-verify_return_error", "-servername", "localhost", "-alpn", "echo", "-no_ign_eof"]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            try:
                process.stdin.write(b"hello\n")
                process.stdin.flush()
                assert await flowcoro.to_thread(process.stdout.readline) == b"hello\n"
            finally:
                process.stdin.close()
                await flowcoro.to_thread(functools.partial(process.wait, PATIENCE))
                process.stdout.close()
            assert server.statistics()["failed"] == server.statistics()["broken"] == 0

    run(main)


def test_openssl_s_server_answers(certificates):
    port = None
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [OPENSSL, "s_server", "-accept", f"127.0.0.1:{port}", "-cert", certificates.good[0], "-key", certificates.good[1], "-rev",
         "-quiet"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    async def main():
        with flowcoro.timeout(PATIENCE):
            while True:
                try:
                    sock = await Socket.connect("127.0.0.1", port, tls=client_tls(ca=certificates.ca))
                except BrokenError:             # it has not begun yet
                    await flowcoro.sleep(0.01)
                else:
                    break
        async with sock:
            await sock.write(b"hello\n")
            assert await sock.read_until() == b"olleh\n"

    try:
        run(main)
    finally:
        process.kill()
        process.stdin.close()
        process.wait(PATIENCE)


def test_the_ssl_modules_own_socket_is_served_to_its_goodbye(certificates):
    def client(address):
        context = ssl.create_default_context(cafile=certificates.ca)
        with socket.create_connection(address, timeout=PATIENCE) as plain:
            with context.wrap_socket(plain, server_hostname="localhost", suppress_ragged_eofs=False) as sock:
                sock.sendall(b"hello")
                assert sock.recv(100) == b"hello"
                sock.unwrap().close()

    async def main():
        async with served(echo, server_tls(*certificates.good)) as server:
            await flowcoro.to_thread(client, server.local)
            while server.statistics()["connections"]:
                await flowcoro.sleep(0.001)
            assert server.statistics()["broken"] == server.statistics()["failed"] == 0

    run(main)


@run_in_kernel
async def test_write_nowait_encrypts_what_there_is_room_for(certificates):
    one, other = memory_socket_pair(Socket, capacity=20_000)
    async with one, other:
        assert one.write_nowait(b"before the handshake") == 20 and one.unsent == 0      # without TLS
        assert await other.read() == b"before the handshake"
        async with flowcoro.TaskGroup() as group:
            group.spawn(one.start_tls(server_tls(*certificates.good), server_side=True))
            await other.start_tls(client_tls(ca=certificates.ca), server_name="localhost")
        content = bytes(range(256)) * 2000
        count = one.write_nowait(content)
        assert count == flowcoro_net.TLS_CHUNK and one.unsent > count - 20_000 and one.write_nowait(b"no room") == 0
        async with flowcoro.TaskGroup() as group:
            group.spawn(one.write(b""))
            assert await other.read_exactly(count) == content[:count]
        assert one.unsent == 0 and one.write_nowait(memoryview(b"room")) == 4
        assert await other.read() == b"room"
        await other.close()
        await one.close()
        with pytest.raises(flowcoro.ClosedError):
            one.write_nowait(b"late")
