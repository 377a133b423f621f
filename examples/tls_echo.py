"""TLS at both ends, with a certificate of one's own that the `openssl` command makes.

A client verifies by default: the certificate must be for the name it connects to, and signed by somebody it
trusts. A certificate that has signed itself is trusted by nobody, so the client is told to trust this one
(`ca=`). Without that the connection fails, as it should: the peer could be anybody.
"""

import pathlib
import shutil
import subprocess
import sys
import tempfile

import flowcoro
import flowcoro_net


def self_signed(folder, name="localhost"):
    """(certificate, key): files of a certificate for a name, and for 127.0.0.1, that is good for a day. For tests only."""
    certificate, key = pathlib.Path(folder) / "certificate.pem", pathlib.Path(folder) / "key.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
                    "-days", "1", "-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name},IP:127.0.0.1",
                    "-keyout", key, "-out", certificate], check=True, capture_output=True)
    return certificate, key


async def echo(sock):
    while data := await sock.read():
        await sock.write(data)


async def main(certificate, key):
    tls = flowcoro_net.server_tls(certificate, key)
    async with await flowcoro_net.TcpServer.listen("127.0.0.1", 0, tls=tls) as server, flowcoro.TaskGroup() as group:
        group.spawn(server.serve(echo))
        trusting = flowcoro_net.client_tls(ca=certificate)
        async with await flowcoro_net.Socket.connect(*server.local, tls=trusting, server_name="localhost") as sock:
            await sock.write(b"a secret\n")
            print(sock.tls.version(), await sock.read_until())
        try:
            await flowcoro_net.Socket.connect(*server.local, tls=True)
        except flowcoro_net.TlsError as error:
            print(f"without ca=: {error.reason}")
        server.close()


if shutil.which("openssl") is None:
    sys.exit(print("the certificate is made by the openssl command, which is not installed"))
with tempfile.TemporaryDirectory() as folder:
    flowcoro.run(main(*self_signed(folder)))
