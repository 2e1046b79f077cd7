"""Where a row may point: nothing but the places allowed is reached, whatever its URI looks like."""

from __future__ import annotations

import http.server
import os
import random
import socket
import threading
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from framecap.errors import FrameError, SettingsError
from framecap.image_uris import FetchRules, Target, allowed_places, decide, fetch, shown

RANDOM_URIS = 2000


def kind(found: bytes | FrameError) -> str | None:
    return found.kind if isinstance(found, FrameError) else None


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """``in`` with a picture, a folder of shards, and every way out of it; ``outside`` with a secret."""
    for name in ("in/deep", "outside"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "in/a.jpg").write_bytes(b"inside")
    (tmp_path / "in/deep/b.jpg").write_bytes(b"deep")
    (tmp_path / "outside/secret.jpg").write_bytes(b"secret")
    (tmp_path / "in/link.jpg").symlink_to(tmp_path / "outside/secret.jpg")
    (tmp_path / "in/folder").symlink_to(tmp_path / "outside")
    (tmp_path / "in/hidden").symlink_to("a.jpg")
    return tmp_path


def test_a_path_beside_or_below_the_shard_or_in_an_allowed_place_is_read(tree: Path) -> None:
    folder, rules = str(tree / "in/deep"), FetchRules(allowed_places(str(tree / "in")))
    for uri in ("b.jpg", "./b.jpg", "../a.jpg", "../hidden", str(tree / "in/a.jpg"), (tree / "in/a.jpg").as_uri()):
        assert kind(fetch(uri, folder, rules=rules)) is None, uri
    assert kind(fetch("../a.jpg", folder)) == "not_allowed"
    other = FetchRules(allowed_places(str(tree / "in"), [str(tree / "outside")]))
    assert fetch("../folder/secret.jpg", folder, rules=other) == b"secret"
    assert kind(fetch("../a.jpg", folder, rules=other)) == "not_allowed"


def test_no_link_and_no_dots_lead_out(tree: Path) -> None:
    folder, rules = str(tree / "in"), FetchRules(allowed_places(str(tree / "in")))
    uris = [
        "link.jpg",
        "folder/secret.jpg",
        "../outside/secret.jpg",
        "deep/../../outside/secret.jpg",
        "..",
        "/etc/passwd",
    ]
    uris += [(tree / "outside/secret.jpg").as_uri(), "file://otherhost/a.jpg", "%2e%2e/outside/secret.jpg"]
    uris += [f"file://{tree}/in/%2e%2e/outside/secret.jpg", "..\\outside\\secret.jpg", "‥/outside/secret.jpg"]
    for uri in uris:
        assert kind(fetch(uri, folder, 0, rules)) == "not_allowed", uri


def test_devices_pipes_and_sockets_are_refused_unread(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.jpg"))
        for uri in ("pipe.jpg", "socket.jpg"):
            assert kind(fetch(uri, str(tmp_path), 0)) == "not_allowed", uri
    assert kind(fetch("/dev/zero", "/dev", 0)) == "not_allowed"


def test_names_that_only_look_odd_are_read(tmp_path: Path) -> None:
    for name in ("кадр 1.jpg", "a::b.jpg", "50%.jpg", "a#1?.jpg", "...", "a\\b.jpg", "~", "frame:01.jpg"):
        (tmp_path / name).write_bytes(b"x")
        assert fetch(name, str(tmp_path), 0) == b"x", name
        assert fetch((tmp_path / name).as_uri(), str(tmp_path), 0) == b"x", name


def test_a_file_beyond_the_limit_of_bytes_is_too_large(tmp_path: Path) -> None:
    with (tmp_path / "sparse.jpg").open("wb") as file:
        file.truncate(10 << 30)
    assert kind(fetch("sparse.jpg", str(tmp_path), 0)) == "too_large"


@pytest.mark.parametrize(
    "uri",
    [
        "reference://k::http://127.0.0.1/ref.json", "simplecache::http://127.0.0.1/a", "zip://x::file:///tmp/none.zip",
        "memory://other/a", "hf://datasets/a/b", "github://a:b@main/x", "gopher://x",
        "data:image/png;base64," + "A" * 100_000,
        "s3://archive-evil/a", "s3://archive/../b/a", "s3://archive@evil/a", "https://cdn.example/other/a",
        "https://cdn.example@evil/pics/a", "https://cdn.example.evil/pics/a", "http://cdn.example/pics/a",
        "https://cdn.example/pics/../other", "https://cdn.example/pics/%2e%2e/other", "https://cdn.example/pics/..%2fother",
        "https://cdn.example/pics/%252e%252e/other", "https://cdn.example\\@evil/pics/a", "https://cdn.example/pics/..;/x",
        "https://cdn.example:8443/pics/a", "https://evil#@cdn.example/pics/a", "https://evil?@cdn.example/pics/a",
        "https://cdn.example/pics-private/a", "//etc/passwd", "s3://archive/pics\n/../..",
    ],
)  # fmt: skip
def test_other_schemes_chains_and_places_are_refused_in_few_words(uri: str) -> None:
    allowed = allowed_places("s3://frames/today", ["s3://archive/pics/", "https://cdn.example/pics"])
    with pytest.raises(FrameError, match=r"^not_allowed") as caught:
        decide(uri, "s3://frames/today", allowed)
    assert len(str(caught.value)) < 400


def test_a_place_stands_for_what_is_below_it_and_gives_scheme_and_host() -> None:
    allowed = allowed_places("s3://frames/today", ["s3://archive/pics/", "https://user:pw@cdn.example/pics"])
    for uri, store, path in [
        ("s3a://archive/pics/a b.jpg", "s3://archive", "/pics/a b.jpg"),
        ("s3://archive/pics//x/../a?b#c.jpg", "s3://archive", "/pics//a?b#c.jpg"),
        ("https://CDN.example/pics/a.jpg?w=1/../2#x", "https://user:pw@cdn.example", "/pics/a.jpg?w=1/../2"),
        ("b.jpg", "s3://frames", "/today/b.jpg"),
    ]:
        target = decide(uri, "s3://frames/today", allowed)
        assert (target.store, target.path) == (store, path), uri
    assert allowed_places("s3://frames/today") == ("s3://frames",)
    assert decide("../pics/a.jpg", "s3://frames/today", allowed_places("s3://frames/today")).path == "/pics/a.jpg"
    assert allowed_places("/") == ()


@pytest.mark.parametrize("place", ["zip://a::s3://b/c.zip", "s3://", "https://cdn.example/a?token=SECRET"])
def test_a_place_that_is_none_is_an_error_of_the_settings(place: str) -> None:
    with pytest.raises(SettingsError, match="--image-uri-allow") as caught:
        allowed_places("in", [place])
    assert "SECRET" not in str(caught.value)


def test_no_password_signature_or_query_is_shown() -> None:
    secrets = "https://user:SECRET@cdn.example/a.jpg?X-Amz-Signature=SECRET#SECRET"
    assert shown(secrets) == "https://cdn.example/a.jpg"
    assert "SECRET" not in str(fetch(secrets, "/nowhere", 0))
    assert "SECRET" not in str(fetch(f"simplecache::{secrets}", "/nowhere", 0))
    rules = FetchRules(("https://user:SECRET@127.0.0.1:1/",))
    assert "SECRET" not in str(fetch("https://127.0.0.1:1/a?sig=SECRET", "/nowhere", 0, rules))


class Server(http.server.BaseHTTPRequestHandler):
    seen: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        Server.seen.append(self.path)
        target = "/pics/ring" if "/ring" in self.path else urllib.parse.unquote(self.path.partition("to=")[2])
        self.send_response(302 if target else 200)
        if target:
            self.send_header("Location", target)
        if "/gzip" in self.path:
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        try:
            for _ in range(1000 if "/endless" in self.path else 1):
                self.wfile.write(b"picture" if "/endless" not in self.path else bytes(1 << 16))
            while "/drip" in self.path:
                self.wfile.write(b"x")
                time.sleep(0.05)
        except OSError:
            return

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def host() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Server.seen = []
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_redirects_are_followed_within_the_place_only(host: str, tmp_path: Path) -> None:
    rules = FetchRules((f"{host}/pics/",), retries=0)
    assert fetch(f"{host}/pics/a?to=/pics/b", "/nowhere", rules=rules) == b"picture"
    for target in ("/internal", "file:///etc/passwd", "http://127.0.0.1:1/pics/a", "/pics/../internal", "//evil/pics/"):
        found = fetch(f"{host}/pics/a?to={urllib.parse.quote(target)}", "/nowhere", rules=rules)
        assert kind(found) == "not_allowed", target
    assert kind(fetch(f"{host}/pics/ring", "/nowhere", rules=rules)) == "not_allowed"
    assert not [path for path in Server.seen if path.startswith("/internal")]


def test_a_fetch_is_bounded_in_bytes_and_seconds(host: str) -> None:
    rules = FetchRules((host,), max_bytes=1 << 20, seconds=1.5, retries=0)
    assert kind(fetch(f"{host}/endless", "/nowhere", rules=rules)) == "too_large"
    assert kind(fetch(f"{host}/drip", "/nowhere", rules=rules)) == "too_slow"
    assert kind(fetch(f"{host}/gzip", "/nowhere", rules=rules)) == "not_an_image"


class Slow(MemoryFileSystem):
    """A store that never answers."""

    protocol = "slow"

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: object) -> bytes:
        time.sleep(60)
        return b""


def test_a_store_that_never_answers_costs_its_seconds() -> None:
    fsspec.register_implementation("slow", Slow, clobber=True)
    rules = FetchRules(("slow://store",), seconds=0.3, retries=0)
    assert kind(fetch("slow://store/a.jpg", "/nowhere", rules=rules)) == "too_slow"


SCHEMES = [
    "s3", "S3", "s3a", "gs", "http", "https", "HTTPS", "file", "local", "memory", "reference", "simplecache",
    "filecache",
    "zip", "tar", "hf", "git", "github", "ftp", "sftp", "smb", "dask", "data", "blockcache", "jar", "webhdfs", "",
]  # fmt: skip
HOSTS = [
    "archive", "archive.evil", "archive-evil", "ARCHIVE", "cdn.example", "cdn.example.", "cdn。example",
    "cdn.example:80",
    "user:pw@cdn.example", "cdn.example@evil", "127.0.0.1", "169.254.169.254", "[::1]", "localhost", "evil", "",
]  # fmt: skip
PARTS = [
    "..", ".", "%2e%2e", "%2E.", "..%2f", "..%5c", "..\\", "%252e%252e", "．．", "‥", "..;", " ..", "..%00",
    "%c0%ae%c0%ae",
    "pics", "a.jpg", "outside", "secret.jpg", "link", "etc", "passwd", "proc", "self", "environ", "dev", "zero", "~",
    "", "кадр", "a b", "?x=/../..", "#/../..", "::", "::http://evil/", "{x}", "\t", "\\", "//", "é", "\u202e",
]  # fmt: skip


def random_uri(rng: random.Random, root: Path) -> str:
    scheme = rng.choice(SCHEMES)
    start = f"{scheme}{rng.choice(('://', '://', '://', ':/', ':', '::'))}" if scheme else ""
    hosts = [*HOSTS, f"{root}/in", f"{root}/in", f"{root}/outside", ""]
    path = rng.choice(("/", "", "/", "\\")).join(rng.choice(PARTS) for _ in range(rng.randrange(1, 9)))
    uri = start + rng.choice(hosts) + rng.choice(("/", "/", "", "\\", "?", "#")) + path
    if rng.random() < 0.1:
        uri = urllib.parse.quote(uri, safe=rng.choice((":/", "", "/")))
    return uri if rng.random() > 0.1 else f"{uri}::{rng.choice(SCHEMES)}://{rng.choice(HOSTS)}/x"


def decided(uri: str, folder: str, allowed: tuple[str, ...]) -> Target | FrameError:
    try:
        return decide(uri, folder, allowed)
    except FrameError as error:
        return error


def reached(store: str, path: str) -> str:
    """What a careless backend or server would open: every escape undone, dots resolved, without query."""
    text = path.partition("#")[0].partition("?")[0] if store.startswith("http") else path
    for _ in range(8):
        text = urllib.parse.unquote(text).replace("\\", "/")
    return f"{store}{os.path.normpath('/' + text.lstrip('/'))}"


def test_two_thousand_random_uris_reach_no_place_that_was_not_allowed(tmp_path: Path) -> None:
    rng, root = random.Random(20261127), tmp_path.resolve()
    (root / "in/pics").mkdir(parents=True)
    (root / "outside").mkdir()
    (root / "in/link").symlink_to(root / "outside")
    folders = [str(root / "in/pics"), "s3://frames/today"]
    allowed = (str(root / "in"), "s3://archive/pics", "https://cdn.example/pics/")
    inside = (f"{root}/in", "s3://archive/pics", "https://cdn.example/pics", "s3://frames/today")
    accepted = 0
    for _ in range(RANDOM_URIS):
        uri, folder = random_uri(rng, root), rng.choice(folders)
        target = decided(uri, folder, allowed)
        if isinstance(target, FrameError):
            assert target.kind == "not_allowed", uri
            assert ":pw" not in str(target), uri
            continue
        accepted += 1
        place = reached(target.store, target.path) if target.store else os.path.realpath(target.path)
        assert place.startswith(tuple(f"{ok}/" for ok in inside)) or place in inside, (uri, folder, target)
        assert "::" not in target.store, uri
    assert accepted > RANDOM_URIS // 20
