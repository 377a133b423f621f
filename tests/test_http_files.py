"""Files: send_file() and static_files(), attacked; driven directly, through a server, and by curl."""

import gzip
import io
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile
import threading

import pytest

import flowcoro
import flowcoro_http
import flowcoro_net
from flowcoro_http import HttpError, HttpServer, Request, Response, send_file, static_files
from flowcoro_testing import run_in_kernel
from http_helpers import exchange, serving

ROOT = pathlib.Path(__file__).resolve().parent.parent

LARGE = bytes(range(256)) * 2**10              # 256 KiB: not kept in memory
SECRET = b"nobody may see this"


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder to serve, and next to it what may not be served. Files in it count as settled however young they are."""
    monkeypatch.setattr(flowcoro_http, "RECENT", -1e9)
    monkeypatch.setattr(flowcoro_http, "_SENT_FILES", flowcoro_http._FileCache(2**20))
    (tmp_path / "secret.txt").write_bytes(SECRET)
    root = tmp_path / "site"
    (root / "sub" / "deep").mkdir(parents=True)
    (root / "a.txt").write_bytes(b"0123456789")
    (root / "empty").write_bytes(b"")
    (root / "large.bin").write_bytes(LARGE)
    (root / ".hidden").write_bytes(SECRET)
    (root / "sub" / "index.html").write_text("<h1>sub</h1>")
    (root / "sub" / "deep" / "x.css").write_text("a{}")
    return root


async def content_of(response):
    """All of it, and the stream closed."""
    if response.stream is None:
        return response.content
    try:
        return b"".join([piece async for piece in response.stream])
    finally:
        await response.stream.aclose()


async def get(handler, path, headers=(), method="GET"):
    """(status, content, headers) of a handler for a path that is encoded, as the router asks it."""
    app = HttpServer()
    app.mount("/", handler)
    response = await app._respond(Request(method, path, headers))
    return response.status, await content_of(response), response.headers


def served(site, path, headers=(), method="GET", **options):
    """The same, in a kernel of its own."""
    return run_in_kernel(get)(static_files(site, **options), path, headers, method)


# ---- what is sent --------------------------------------------------------------------------------------------

def test_a_small_file_comes_with_all_that_a_cache_needs(site):
    status, content, headers = served(site, "/a.txt", max_age=60)
    assert (status, content) == (200, b"0123456789")
    assert headers["content-type"] == "text/plain; charset=utf-8"
    assert headers["accept-ranges"] == "bytes" and headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "public, max-age=60"
    assert headers["etag"].startswith('"') and headers["last-modified"].endswith(" GMT")


def test_a_large_file_is_a_stream_that_the_system_can_send(site):
    async def main():
        response = await static_files(site)(Request("GET", "/large.bin"), rest="/large.bin")
        assert type(response.stream) is flowcoro_http._FileStream and response.headers["content-length"] == str(len(LARGE))
        assert await content_of(response) == LARGE
        assert response.stream.file.closed
    flowcoro.run(main())


@pytest.mark.parametrize("name, kind", [
    ("a.html", "text/html; charset=utf-8"), ("a.js", "text/javascript; charset=utf-8"), ("a.wasm", "application/wasm"),
    ("a.json", "application/json"), ("a.tar.gz", "application/gzip"), ("a.svg", "image/svg+xml"), ("A.PNG", "image/png"),
    ("noending", "application/octet-stream"), ("a.md", "text/markdown; charset=utf-8"), ("a.woff2", "font/woff2"),
    ("data:text/html,x", "application/octet-stream"),
])
def test_the_media_type_is_that_of_the_name_on_every_machine(name, kind):
    assert flowcoro_http._file_type(name) == kind


def test_head_has_the_fields_of_get_and_no_content(site):
    for path in ("/a.txt", "/large.bin"):
        _, content, whole = served(site, path)
        status, nothing, headers = served(site, path, method="HEAD")
        assert status == 200 and headers.get("content-length", str(len(nothing))) == str(len(content))
        assert headers["etag"] == whole["etag"]


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_other_methods_are_told_what_is_allowed(site, method):
    status, _, headers = served(site, "/a.txt", method=method)
    assert status == 405 and headers["allow"] == "GET, HEAD, OPTIONS"
    status, _, headers = served(site, "/a.txt", method="OPTIONS")
    assert status == 204 and headers["allow"] == "GET, HEAD, OPTIONS"


def test_a_file_with_a_name_for_saving_comes_as_an_attachment(site):
    async def main():
        response = await send_file(Request("GET", "/"), site / "a.txt", filename="Über\r\nX: y.txt")
        value = response.headers["content-disposition"]
        assert value.startswith("attachment; ") and "\r" not in value
        shown = await send_file(Request("GET", "/"), site / "a.txt", filename="b.txt", inline=True, media_type="text/csv")
        assert shown.headers["content-disposition"] == 'inline; filename="b.txt"'
        assert shown.headers["content-type"] == "text/csv"
        with pytest.raises(HttpError) as caught:
            await send_file(Request("GET", "/"), site / "missing")
        assert caught.value.status == 404
        posted = Request("POST", "/", [("If-None-Match", "*"), ("Range", "bytes=0-1")])         # which say nothing of this file
        assert (await send_file(posted, os.fsencode(site / "a.txt"))).content == b"0123456789"
        with pytest.raises(HttpError) as caught:
            await send_file(Request("GET", "/"), site)
        assert caught.value.status == 404
    flowcoro.run(main())


# ---- conditions and ranges -----------------------------------------------------------------------------------

@pytest.mark.parametrize("path", ["/a.txt", "/large.bin"])
def test_who_has_it_already_is_told_so(site, path):
    _, _, headers = served(site, path)
    for field, value in (("If-None-Match", headers["etag"]), ("If-Modified-Since", headers["last-modified"])):
        status, content, again = served(site, path, [(field, value)], max_age=5)
        assert (status, content) == (304, b"")
        assert again["etag"] == headers["etag"] and again["cache-control"] and "content-type" not in again
    assert served(site, path, [("If-None-Match", '"other"')])[0] == 200
    assert served(site, path, [("If-Match", '"other"')])[0] == 412


@pytest.mark.parametrize("path, whole", [("/a.txt", b"0123456789"), ("/large.bin", LARGE)])
def test_ranges_are_parts_of_the_whole(site, path, whole):
    size = len(whole)
    for asked, first, last in (("0-0", 0, 0), ("2-4", 2, 4), ("-3", size - 3, size - 1), ("5-", 5, size - 1),
                               (f"1-{size * 2}", 1, size - 1)):
        status, content, headers = served(site, path, [("Range", f"bytes={asked}")])
        assert (status, content) == (206, whole[first:last + 1])
        assert headers["content-range"] == f"bytes {first}-{last}/{size}"
        assert headers.get("content-length", str(len(content))) == str(len(content))
    status, _, headers = served(site, path, [("Range", f"bytes={size}-")])
    assert status == 416 and headers["content-range"] == f"bytes */{size}"
    assert served(site, path, [("Range", "lines=1-2")])[:2] == (200, whole)


def test_several_ranges_are_framed_as_multipart(site):
    for path, whole in (("/a.txt", b"0123456789" * 40), ("/large.bin", LARGE)):
        (site / path[1:]).write_bytes(whole)
        status, content, headers = served(site, path, [("Range", "bytes=0-9,200-204,-5")])
        kind, _, boundary = headers["content-type"].partition("; boundary=")
        assert status == 206 and kind == "multipart/byteranges" and "content-range" not in headers
        assert headers.get("content-length", str(len(content))) == str(len(content))
        parts = content.split(b"\r\n--" + boundary.encode())
        assert parts[0] == b"" and parts[-1] == b"--\r\n" and len(parts) == 5
        for part, (first, end) in zip(parts[1:-1], ((0, 10), (200, 205), (len(whole) - 5, len(whole)))):
            head, data = part.split(b"\r\n\r\n", 1)
            assert data == whole[first:end] and b"Content-Range: bytes %d-%d/%d" % (first, end - 1, len(whole)) in head


def test_a_range_of_an_empty_file_is_all_of_it(site):
    for asked in ("bytes=0-", "bytes=-1", "bytes=0-0,1-2"):
        assert served(site, "/empty", [("Range", asked)])[:2] == (200, b"")


def test_a_range_of_what_has_been_changed_is_the_whole_new_file(site):
    old = served(site, "/a.txt")[2]["etag"]
    assert served(site, "/a.txt", [("Range", "bytes=0-1"), ("If-Range", old)])[:2] == (206, b"01")
    (site / "a.txt").write_bytes(b"abcdefghij")
    assert served(site, "/a.txt", [("Range", "bytes=0-1"), ("If-Range", old)])[:2] == (200, b"abcdefghij")


def test_a_large_file_that_has_just_been_changed_has_no_strong_tag(site, monkeypatch):
    assert not served(site, "/large.bin")[2]["etag"].startswith("W/")
    monkeypatch.setattr(flowcoro_http, "RECENT", 1e9)
    assert served(site, "/large.bin")[2]["etag"].startswith("W/")


def test_a_date_ahead_of_the_clock_or_before_1970_is_none(site):
    os.utime(site / "a.txt", (4e9, 4e9))
    assert "209" not in served(site, "/a.txt")[2]["last-modified"]
    os.utime(site / "a.txt", (-5, -5))
    assert served(site, "/a.txt")[2]["last-modified"] == "Thu, 01 Jan 1970 00:00:00 GMT"


# ---- what is not sent ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("path", [
    "/../secret.txt", "/sub/../../secret.txt", "/%2e%2e/secret.txt", "/%2E%2e/secret.txt", "/..%2fsecret.txt", "/..%5csecret.txt",
    "/..\\secret.txt", "/sub/..%2f..%2fsecret.txt", "/%2e%2e%2fsecret.txt", "/%252e%252e/secret.txt", "/....//secret.txt",
    "/.../secret.txt", "/%c0%ae%c0%ae/secret.txt", "/%c0%af../secret.txt", "/..%c0%afsecret.txt", "/.%00./secret.txt",
    "/a.txt%00", "/a.txt%00.html", "//etc/passwd", "/%2fetc/passwd", "/%2Fetc%2Fpasswd", "///a.txt", "/sub//deep/x.css",
    "/./a.txt", "/sub/./index.html", "/sub/..", "/sub/../a.txt", "/..", "/.", "/.hidden", "/%2ehidden", "/sub/%2e%2e/.hidden",
    "/a.txt/", "/a.txt/x", "/a.txt/..", "/C:/a.txt", "/c:%5cwindows", "/%5c%5cserver%5cshare", "/~root", "/a.txt::$DATA",
    "/" + "a" * 300, "/" + "a/" * 3000, "/%ff", "/a.txt%20", "/a.txt.", "/file:///etc/passwd", "/proc/self/environ",
    "/sub/deep", "/%EF%BC%8E%EF%BC%8E/secret.txt",
])
def test_no_spelling_of_a_path_leads_out_of_the_folder(site, path):
    for options in ({}, {"listing": True}, {"follow_symlinks": True}):
        status, content, _ = served(site, path, **options)
        assert status in (400, 404) or path == "/sub/deep" and status == 308, (status, options)
        assert SECRET not in content and b"root:" not in content


def test_names_that_windows_reads_in_another_way_are_not_asked_of_it():
    served_there = [name for name in ("con", "NUL.txt", "aux.", "com1.log", "x.", "x ", "C:", "a:b", "lpt1", "a|b", "good.txt",
                                      "console", "..", "", ".x", "a\\b", "a\0b") if flowcoro_http._is_served(name, False, True)]
    assert served_there == ["good.txt", "console"]
    assert flowcoro_http._is_served("aux.html", False, False)


def test_names_with_a_dot_are_hidden_but_for_well_known(site):
    (site / ".well-known").mkdir()
    (site / ".well-known" / "security.txt").write_text("x")
    (site / "sub" / ".well-known").mkdir()
    (site / "sub" / ".well-known" / "x").write_text("x")
    assert served(site, "/.well-known/security.txt")[0] == 200
    assert served(site, "/sub/.well-known/x")[0] == 404
    assert served(site, "/.hidden", hidden=True)[:2] == (200, SECRET)
    assert served(site, "/../secret.txt", hidden=True)[0] == 404


def test_links_are_not_followed_wherever_they_are(site, tmp_path):
    outside = tmp_path / "outside"
    (outside / "inner").mkdir(parents=True)
    (outside / "inner" / "x.txt").write_bytes(SECRET)
    (outside / "index.html").write_bytes(SECRET)
    (site / "link.txt").symlink_to(tmp_path / "secret.txt")
    (site / "folder").symlink_to(outside)
    (site / "sub" / "middle").symlink_to("../../outside")
    (site / "inside.txt").symlink_to("a.txt")
    (site / "loop").symlink_to("loop")
    (site / "dangling").symlink_to("nowhere")
    (site / "linked_index").mkdir()
    (site / "linked_index" / "index.html").symlink_to("../../secret.txt")
    (site / "b.txt").write_text("b")
    (site / "b.txt.gz").symlink_to("../secret.txt")
    for path in ("/link.txt", "/folder/", "/folder/inner/x.txt", "/folder/index.html", "/sub/middle/inner/x.txt", "/inside.txt",
                 "/loop", "/dangling", "/folder", "/linked_index/"):
        assert served(site, path)[0] == 404, path
        assert SECRET not in served(site, path, listing=True)[1]
    assert served(site, "/b.txt", [("Accept-Encoding", "gzip")])[1] == b"b"
    assert served(site, "/link.txt", follow_symlinks=True)[1] == SECRET
    assert served(site, "/folder/inner/x.txt", follow_symlinks=True)[1] == SECRET
    assert served(site, "/loop", follow_symlinks=True)[0] == 404
    (tmp_path / "alias").symlink_to(site)
    assert served(tmp_path / "alias", "/a.txt")[0] == 200           # the folder itself may be one


def test_without_folder_descriptors_links_are_not_followed_either(site, tmp_path, monkeypatch):
    monkeypatch.setattr(flowcoro_http, "_CAN_WALK", False)
    test_links_are_not_followed_wherever_they_are(site, tmp_path)
    assert served(site, "/sub/")[1] == b"<h1>sub</h1>"


def test_a_link_that_takes_the_place_of_a_known_file_or_folder_is_not_followed(site, tmp_path):
    async def main():
        handler = static_files(site)
        for path, place, target in (("/a.txt", site / "a.txt", tmp_path / "secret.txt"),
                                    ("/sub/index.html", site / "sub", tmp_path / "outside"),
                                    ("/large.bin", site / "large.bin", tmp_path / "secret.txt")):
            assert (await get(handler, path))[0] == 200
            place.rename(tmp_path / f"moved-{place.name}")
            place.symlink_to(target)
            assert (await get(handler, path))[0] == 404
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "index.html").write_bytes(SECRET)
    flowcoro.run(main())


def test_a_race_of_a_link_and_a_file_never_shows_what_is_outside(site, tmp_path):
    """Another thread puts links and files into the same places all the while."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "x").write_bytes(SECRET)
    (site / "real").mkdir()
    (site / "real" / "x").write_bytes(b"fine")
    stop = threading.Event()

    def swap():
        folder, link = site / "real", site / "swapped"
        link.symlink_to(outside)
        while not stop.is_set():
            for source, target in ((folder, tmp_path / "t"), (link, folder), (folder, link), (tmp_path / "t", folder)):
                os.rename(source, target)

    async def main():
        handler = static_files(site)
        for _ in range(300):
            status, content, _ = await get(handler, "/real/x")
            assert (status, content) == (200, b"fine") or status == 404 and SECRET not in content
    thread = threading.Thread(target=swap)
    thread.start()
    try:
        flowcoro.run(main())
    finally:
        stop.set()
        thread.join()


def test_pipes_sockets_and_devices_are_not_found_and_nobody_waits_for_them(site):
    os.mkfifo(site / "pipe")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(site / "socket"))
        for path in ("/pipe", "/socket"):
            assert served(site, path)[0] == served(site, path, follow_symlinks=True)[0] == 404
    (site / "null").symlink_to("/dev/null")
    (site / "tty").symlink_to("/dev/tty")
    assert served(site, "/null", follow_symlinks=True)[0] == served(site, "/tty", follow_symlinks=True)[0] == 404
    with pytest.raises(HttpError):
        flowcoro.run(send_file(Request("GET", "/"), site / "pipe"))


@pytest.mark.parametrize("put", [
    lambda place, target: os.mkfifo(place), lambda place, target: place.symlink_to(target)], ids=["a pipe", "a link"])
def test_what_is_put_there_between_look_and_open_is_neither_waited_for_nor_followed(site, tmp_path, monkeypatch, put):
    real = os.open

    def late(path, *flags, **options):
        if path == "a.txt" and "dir_fd" in options:
            os.unlink(site / "a.txt")
            put(site / "a.txt", tmp_path / "secret.txt")
        return real(path, *flags, **options)
    monkeypatch.setattr(os, "open", late)
    with pytest.raises(OSError) as caught:
        flowcoro_http._Folder(site, False, None, False, None, False, False, 0)._open(["a.txt"])
    assert caught.value.errno in flowcoro_http._NOT_THERE


def test_no_descriptor_is_left_open_and_no_pipe_is_ever_opened(site, monkeypatch):
    os.mkfifo(site / "pipe")
    opened, real = [], os.open
    monkeypatch.setattr(os, "open", lambda path, *flags, **options: (opened.append(path), real(path, *flags, **options))[1])

    async def main():
        handler, strict = static_files(site, listing=True, cache_bytes=0), static_files(site, follow_symlinks=True)
        await get(handler, "/a.txt")
        before = sorted(os.listdir("/proc/self/fd"))
        for path in ("/a.txt", "/large.bin", "/sub/deep/x.css", "/sub/", "/sub/deep/", "/", "/pipe", "/a.txt/", "/missing/x",
                     "/sub"):
            for method in ("GET", "HEAD"):
                await get(handler, path, [("Range", "bytes=0-1,200-300")], method)
                await get(strict, path, [("If-None-Match", "*")], method)
        assert sorted(os.listdir("/proc/self/fd")) == before
    flowcoro.run(main())
    assert opened and not [path for path in opened if os.fspath(path).endswith("pipe")]


def test_what_may_not_be_read_is_forbidden(site, monkeypatch):
    """The system's word, not ours; root may read everything, so there it is one without such rights who asks."""
    (site / "a.txt").chmod(0)
    (site / "b.txt").write_text("b")
    if os.geteuid() == 0:
        program = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import flowcoro, flowcoro_http
os.setgid(65534)
os.setuid(65534)
async def main():
    for name in "a.txt", "b.txt":
        try:
            found = await flowcoro_http.static_files({str(site)!r})(flowcoro_http.Request("GET", "/" + name), rest="/" + name)
            print(found.status)
        except flowcoro_http.HttpError as error:
            print(error.status)
flowcoro.run(main())
"""
        for folder in (site, *site.parents):                # pytest's own folders are its user's alone
            if folder.stat().st_uid == 0 and folder.is_relative_to(tempfile.gettempdir()) and not folder.samefile(
                    tempfile.gettempdir()):
                folder.chmod(folder.stat().st_mode | 0o055)
        done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=60)
        assert (done.stdout.split(), done.stderr) == (["403", "200"], "")
    else:
        assert served(site, "/a.txt")[0] == 403 and served(site, "/b.txt")[0] == 200


def test_an_error_that_forbids_is_403_and_one_of_descriptors_503(site, monkeypatch):
    for number, status in ((13, 403), (24, 503), (36, 404)):
        def refuse(*args, **options):
            raise OSError(number, "x")
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", refuse)
            assert served(site, "/a.txt")[0] == status
    number = 5                                                  # the disk
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(os, "open", refuse)
        flowcoro.run(static_files(site)(Request("GET", "/a.txt"), rest="/a.txt"))


# ---- what is kept in memory ----------------------------------------------------------------------------------

@pytest.fixture
def trips(monkeypatch):
    """Functions that were called in threads."""
    calls, real = [], flowcoro.to_thread
    monkeypatch.setattr(flowcoro, "to_thread", lambda function, *args, **options: (
        calls.append(function.__name__), real(function, *args, **options))[1])
    return calls


def test_a_known_file_costs_no_thread_until_it_changes_or_time_has_passed(site, trips):
    @run_in_kernel
    async def main():
        handler = static_files(site)
        for _ in range(3):
            assert (await get(handler, "/a.txt"))[1] == b"0123456789"
        assert trips == ["_look"]
        (site / "a.txt").write_bytes(b"9876543210")
        assert (await get(handler, "/a.txt"))[1] == b"9876543210"
        (site / "a.txt").unlink()
        assert (await get(handler, "/a.txt"))[0] == 404
        (site / "a.txt").write_bytes(b"again")
        await get(handler, "/a.txt")
        del trips[:]
        await flowcoro.sleep(flowcoro_http.FILE_SECONDS + 1)
        await get(handler, "/a.txt")
        assert trips == ["_look"]
        del trips[:]
        for _ in range(3):
            await content_of(await send_file(Request("GET", "/"), site / "a.txt"))
        assert trips == ["_look_at"]
    main()


def test_what_has_just_been_changed_is_not_kept(site, trips, monkeypatch):
    monkeypatch.setattr(flowcoro_http, "RECENT", 1e9)

    async def main():
        handler = static_files(site)
        for _ in range(3):
            await get(handler, "/a.txt")
        assert trips == ["_look"] * 3
    flowcoro.run(main())


def test_what_is_kept_is_bounded(site, monkeypatch):
    async def main():
        handler = static_files(site, cache_bytes=1000)
        cache = handler.__self__._cache
        for number in range(20):
            (site / f"{number}.txt").write_bytes(b"x" * 300)
            await get(handler, f"/{number}.txt")
            assert cache._bytes <= 1000 and cache._bytes == 300 * len(cache._found)
        (site / "big.txt").write_bytes(b"x" * 2000)
        assert len((await get(handler, "/big.txt"))[1]) == 2000
        assert list(cache._found) == ["/17.txt", "/18.txt", "/19.txt"]
        for _ in range(3):                                      # replaced: counted once
            (site / "19.txt").write_bytes(b"x" * 200)
            (site / "18.txt").write_bytes(b"x" * 300)
            await get(handler, "/19.txt")
            await get(handler, "/18.txt")
        assert len(cache._found) == 3 and cache._bytes == 800
        monkeypatch.setattr(flowcoro_http, "CACHED_FILES", 5)
        for number in range(20):
            (site / f"{number}.txt").write_bytes(b"")
            await get(handler, f"/{number}.txt")
        assert len(cache._found) == 5 and cache._bytes == 0
    flowcoro.run(main())


def test_a_large_file_that_was_replaced_after_the_look_is_sent_as_it_is_now(site):
    async def main():
        handler = static_files(site)
        await get(handler, "/large.bin")
        folder, found = handler.__self__, handler.__self__._cache.get("/large.bin")
        for new in (LARGE[::-1] + b"!", b"small now"):
            (site / "large.bin").write_bytes(new)               # what `found` does not know of
            response = flowcoro_http._file_response(Request("GET", "/large.bin"), found, lambda: folder._open_known(found))
            assert await content_of(response) == new and response.headers["etag"] != found.etag
    flowcoro.run(main())


# ---- siblings ------------------------------------------------------------------------------------------------

def test_a_compressed_sibling_is_sent_to_who_wants_it(site):
    packed = gzip.compress(b"a{}", mtime=0)
    (site / "sub" / "deep" / "x.css.gz").write_bytes(packed)
    (site / "sub" / "deep" / "x.css.br").write_bytes(b"brotli")
    whole = served(site, "/sub/deep/x.css")
    assert whole[:2] == (200, b"a{}") and whole[2]["vary"] == "Accept-Encoding" and "content-encoding" not in whole[2]
    for accepted, coding, content in (("gzip", "gzip", packed), ("gzip, br", "br", b"brotli"), ("br;q=0.1, gzip", "gzip", packed),
                                      ("identity", None, b"a{}"), ("br;q=0, *", "gzip", packed), ("zstd", None, b"a{}")):
        status, got, headers = served(site, "/sub/deep/x.css", [("Accept-Encoding", accepted)])
        assert (status, got, headers.get("content-encoding")) == (200, content, coding), accepted
        assert headers["content-type"] == "text/css; charset=utf-8" and headers["vary"] == "Accept-Encoding"
        assert (headers["etag"] == whole[2]["etag"]) == (coding is None)
    assert served(site, "/sub/deep/x.css", [("Accept-Encoding", "gzip"), ("Range", "bytes=0-1")])[1] == packed[:2]
    assert served(site, "/sub/deep/x.css", [("Accept-Encoding", "gzip")], precompressed=False)[1] == b"a{}"
    assert "vary" not in served(site, "/a.txt", [("Accept-Encoding", "gzip")])[2]


def test_a_sibling_that_is_older_is_passed_over_and_one_that_changes_is_noticed(site):
    async def main():
        handler, asked = static_files(site), [("Accept-Encoding", "gzip")]
        sibling = site / "a.txt.gz"
        sibling.write_bytes(b"1")
        assert (await get(handler, "/a.txt", asked))[1] == b"1"
        sibling.write_bytes(b"2")
        assert (await get(handler, "/a.txt", asked))[1] == b"2"
        os.utime(sibling, (1000, 1000))
        assert (await get(handler, "/a.txt", asked))[1] == b"0123456789"
        os.utime(sibling)
        (site / "a.txt").write_bytes(b"new")
        os.utime(sibling, (2e9, 2e9))
        assert (await get(handler, "/a.txt", asked))[1] == b"2"
        sibling.unlink()
        assert (await get(handler, "/a.txt", asked))[1] == b"new"
    flowcoro.run(main())


# ---- folders -------------------------------------------------------------------------------------------------

def test_a_folder_is_its_index_and_has_a_slash(site):
    assert served(site, "/sub/")[:2] == (200, b"<h1>sub</h1>")
    assert served(site, "/sub/")[2]["content-type"] == "text/html; charset=utf-8"
    status, _, headers = served(site, "/sub?x=1&y=%2F")
    assert (status, headers["location"]) == (308, "./sub/?x=1&y=%2F")
    assert served(site, "/sub/deep/")[0] == served(site, "/")[0] == served(site, "/sub/", index=None)[0] == 404
    (site / "a b%").mkdir()
    assert served(site, "/a%20b%25")[2]["location"] == "./a%20b%25/"
    (site / "sub" / "deep" / "index.html").mkdir()
    assert served(site, "/sub/deep/")[0] == 404


def test_a_mount_without_its_slash_is_redirected_below_itself(site):
    async def main():
        app = HttpServer()
        app.mount("/static", static_files(site, listing=True))
        response = await app._respond(Request("GET", "/static"))
        assert (response.status, response.headers["location"]) == (308, "./static/")
        assert (await app._respond(Request("GET", "/static/"))).status == 200
        assert (await app._respond(Request("GET", "/static/a.txt"))).content == b"0123456789"
    flowcoro.run(main())


def test_a_listing_is_sorted_escaped_and_shows_nothing_hidden(site, tmp_path):
    (site / "<img src=x onerror=alert(1)>&'\".txt").write_text("x")
    (site / "javascript:alert(1)").write_text("x" * 1234)
    (site / "link").symlink_to(tmp_path)
    os.mkfifo(site / "pipe")
    with open(os.path.join(os.fsencode(site), b"\xff.txt"), "wb"):
        pass
    assert served(site, "/")[0] == 404
    status, content, headers = served(site, "/", listing=True)
    page = content.decode()
    assert status == 200 and headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "<img" not in page and "&lt;img src=x onerror=alert(1)&gt;&amp;&#x27;&quot;.txt" in page
    assert 'href="./javascript%3Aalert%281%29"' in page and "<td>1,234</td>" in page
    assert ".hidden" not in page and "pipe" not in page and "link" not in page and "\ufffd" not in page
    assert page.index("sub/") < page.index("a.txt") < page.index("empty") < page.index("large.bin")
    assert '"../"' not in page and '<a href="../">' in served(site, "/sub/deep/", listing=True)[1].decode()
    (site / "<b>").mkdir()
    assert "<b>" not in served(site, "/%3Cb%3E/", listing=True)[1].decode()
    assert served(site, "/sub/", listing=True)[1] == b"<h1>sub</h1>"
    assert "link/" in served(site, "/", listing=True, follow_symlinks=True)[1].decode()


def test_a_listing_has_a_bounded_length(site, monkeypatch):
    monkeypatch.setattr(flowcoro_http, "LISTED", 3)
    page = served(site, "/", listing=True)[1].decode()
    assert page.count("<tr>") == 4 and "Only 3 are shown" in page


def test_what_cannot_be_served_is_said_when_it_is_made(site):
    with pytest.raises(NotADirectoryError):
        static_files(site / "missing")
    with pytest.raises(NotADirectoryError):
        static_files(site / "a.txt")
    for options in ({"index": "../x"}, {"index": ""}, {"max_age": -1}):
        with pytest.raises(ValueError):
            static_files(site, **options)


# ---- through a server ----------------------------------------------------------------------------------------

def test_files_of_all_sizes_arrive_whole(site):
    async def main():
        app = HttpServer()
        app.mount("/", static_files(site))
        async with serving(app) as server:
            for path, whole in (("/a.txt", b"0123456789"), ("/large.bin", LARGE), ("/empty", b"")):
                for method in ("GET", "HEAD"):
                    data = await exchange(server, f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
                    head, _, content = data.partition(b"\r\n\r\n")
                    assert head.startswith(b"HTTP/1.1 200 ") and b"\r\nContent-Length: %d\r\n" % len(whole) in head + b"\r\n"
                    assert content == (whole if method == "GET" else b"")
            two = b"GET /large.bin HTTP/1.1\r\nHost: x\r\n\r\nGET /a.txt HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
            assert (await exchange(server, two)).endswith(b"0123456789")          # the connection went on after the file
    flowcoro.run(main())


@pytest.mark.parametrize("asked", ["", "Range: bytes=0-99999,150000-\r\n"])
def test_a_file_that_is_cut_while_it_is_sent_breaks_the_connection_off(site, monkeypatch, reports, asked):
    async def main():
        app = HttpServer()
        handler = static_files(site)

        async def cutting(request, rest):
            response = await handler(request, rest)
            os.truncate(site / "large.bin", 1000)
            return response
        app.mount("/", cutting)
        async with serving(app) as server:
            request = f"GET /large.bin HTTP/1.1\r\nHost: x\r\n{asked}\r\n".encode()
            with pytest.raises(flowcoro_net.BrokenError):
                await exchange(server, request)
    flowcoro.run(main())
    assert any("become shorter" in str(error) for _, error in reports)


@pytest.mark.parametrize("asked", ["", "Range: bytes=0-9,150000-\r\n"])
def test_a_file_whose_answer_a_middleware_puts_another_in_place_of_is_closed(site, asked):
    files = []

    async def main():
        app = HttpServer()
        app.mount("/", static_files(site))

        @app.middleware
        async def instead(request, call_next):
            stream = (await call_next(request)).stream
            files.append(stream._file if asked else stream.file)
            return "another"
        async with serving(app) as server:
            request = f"GET /large.bin HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{asked}\r\n".encode()
            assert (await exchange(server, request)).endswith(b"another")
            assert [file.closed for file in files] == [True]
    flowcoro.run(main())


def test_a_file_that_is_replaced_while_it_is_sent_arrives_as_it_was(site):
    async def main():
        app = HttpServer()
        handler = static_files(site)

        async def replacing(request, rest):
            response = await handler(request, rest)
            (site / "new").write_bytes(b"another one")
            os.replace(site / "new", site / "large.bin")
            return response
        app.mount("/", replacing)
        async with serving(app) as server:
            data = await exchange(server, b"GET /large.bin HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert data.partition(b"\r\n\r\n")[2] == LARGE
    flowcoro.run(main())


@pytest.mark.skipif(not hasattr(socket, "TCP_CORK"), reason="Linux has TCP_CORK")
def test_the_head_of_a_large_file_is_corked_with_it(site, monkeypatch):
    monkeypatch.setattr(flowcoro_net, "CORKED_FROM", len(LARGE))
    seen, real_sendfile = [], os.sendfile

    def sendfile(out, *args):
        with socket.socket(fileno=os.dup(out)) as plain:
            seen.append(plain.getsockopt(socket.IPPROTO_TCP, socket.TCP_CORK))
        return real_sendfile(out, *args)

    async def main():
        monkeypatch.setattr(os, "sendfile", sendfile)
        app = HttpServer()
        app.mount("/", static_files(site))
        async with serving(app) as server:
            data = await exchange(server, b"GET /large.bin HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert data.partition(b"\r\n\r\n")[2] == LARGE
        assert seen[0] == 1 and seen[-1] == 0
    flowcoro.run(main())


def test_a_client_that_goes_leaves_no_file_open(site):
    streams = []

    async def main():
        app = HttpServer()
        handler = static_files(site)
        with open(site / "huge", "wb") as file:
            file.truncate(2**32)                                # 4 GiB, and nothing on the disk

        async def noting(request, rest):
            response = await handler(request, rest)
            streams.append(response.stream)
            return response
        app.mount("/", noting)
        async with serving(app) as server:
            async with await flowcoro_net.Socket.connect(*server.local) as sock:
                await sock.write(b"GET /huge HTTP/1.1\r\nHost: x\r\n\r\n")
                assert b"Content-Length: 4294967296\r\n" in await sock.read_until(b"\r\n\r\n")
                await sock.read(100)
            while not streams[0].file.closed:
                await flowcoro.sleep(0.001)
    flowcoro.run(main())


def test_a_client_that_does_not_read_a_file_is_cut(site, monkeypatch):
    monkeypatch.setattr(flowcoro_http, "SWEEP", 0.01)

    async def main():
        app = HttpServer(send_timeout=0.1)
        app.mount("/", static_files(site))
        with open(site / "huge", "wb") as file:
            file.truncate(2**32)
        async with serving(app) as server, await flowcoro_net.Socket.connect(*server.local) as sock:
            await sock.write(b"GET /huge HTTP/1.1\r\nHost: x\r\n\r\n")
            await sock.read(100)
            with flowcoro.timeout(10):
                while server.statistics()["connections"]:
                    await flowcoro.sleep(0.001)
            with pytest.raises(flowcoro_net.BrokenError):
                while await sock.read():
                    pass
    flowcoro.run(main())


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_gets_files_ranges_and_resumes(site, tmp_path):
    def curl(*arguments):
        return subprocess.run(["curl", "-sS", "--noproxy", "*", *map(str, arguments)], stdout=subprocess.PIPE, check=True,
                              timeout=30).stdout

    async def main():
        app = HttpServer()
        app.mount("/", static_files(site))
        async with serving(app) as server:
            url, target = server.url, tmp_path / "got"
            run = flowcoro.to_thread
            assert await run(curl, f"{url}/large.bin") == LARGE
            assert await run(curl, "-r", "10-19", f"{url}/large.bin") == LARGE[10:20]
            assert b"206" in await run(curl, "-o", os.devnull, "-w", "%{http_code}", "-r", "0-1,1000-1001", f"{url}/large.bin")
            target.write_bytes(LARGE[:1000])
            await run(curl, "-C", "-", "-o", target, f"{url}/large.bin")
            assert target.read_bytes() == LARGE
            assert await run(curl, "--path-as-is", "-o", os.devnull, "-w", "%{http_code}", f"{url}/../secret.txt") == b"404"
            assert await run(curl, "-L", f"{url}/sub") == b"<h1>sub</h1>"
            tag = (await run(curl, "-I", f"{url}/a.txt")).decode().lower().split("etag: ")[1].split("\r\n")[0]
            assert await run(curl, "-w", "%{http_code}", "-H", f"If-None-Match: {tag}", f"{url}/a.txt") == b"304"
    flowcoro.run(main())


def test_a_file_stream_says_how_much_of_it_was_sent_when_it_is_closed():
    async def main():
        stream, said = flowcoro_http._FileStream(io.BytesIO(b"0123456789"), 2, 5), []
        stream.done.append(said.append)
        assert b"".join([piece async for piece in stream]) == b"23456"
        await stream.aclose()
        await stream.aclose()
        assert said == [5] and stream.file.closed
    flowcoro.run(main())


def test_a_response_is_one():
    assert isinstance(flowcoro_http._response_of(200, flowcoro_http.Headers(), b""), Response)
