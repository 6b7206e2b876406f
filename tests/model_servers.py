"""Small servers that models are fetched from: a Hub, an S3 service, a web server."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Site:
    """What a server serves, how it misbehaves, and what it was asked."""

    root: Path
    token: str | None = None
    """Without it in the Authorization header: 401 (where there is another: 403)."""
    cut_bytes: int | None = None
    """The next answer with more of a body than this ends here, in the middle."""
    failures: int = 0
    """So many of the next answers are 503."""
    url: str = ""
    requests: list[str] = field(default_factory=list)


@contextmanager
def serving(site: Site, handler: type[Files]) -> Iterator[Site]:
    """A server in threads, while the context lasts."""
    made = type("Handler", (handler,), {"site": site})
    server = ThreadingHTTPServer(("127.0.0.1", 0), made)
    server.daemon_threads = True
    thread = Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    site.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield site
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Files(BaseHTTPRequestHandler):
    """A web server with ranges and ETags."""

    site: ClassVar[Site]
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _answer(self) -> None:
        site = self.site
        site.requests.append(f"{self.command} {self.path} {self.headers.get('Range', '')}".strip())
        said = self.headers.get("Authorization", "")
        if site.failures > 0:
            site.failures -= 1
            self._send(503, b"")
        elif site.token is not None and site.token not in said:
            self._send(403 if said else 401, b"")
        else:
            self.answer(unquote(urlsplit(self.path).path), parse_qs(urlsplit(self.path).query))

    def answer(self, path: str, query: dict[str, list[str]]) -> None:
        self.send_file(self.site.root / path.strip("/"))

    def send_file(self, path: Path, **headers: str) -> None:
        if not path.is_file():
            self._send(404, b"")
            return
        data = path.read_bytes()
        headers["ETag"] = f'"{hashlib.sha256(data).hexdigest()}"'
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            self._send(200, data, **headers)
            return
        start, end = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
        self._send(206, data[start : end + 1], **headers)

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Last-Modified", "Tue, 01 Sep 2026 00:00:00 GMT")
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.site.cut_bytes
        if cut is not None and len(body) > cut:
            self.site.cut_bytes, body = None, body[:cut]
            self.close_connection = True
        self.wfile.write(body)


class Hub(Files):
    """The paths of the Hub's API that `huggingface_hub` asks for; `root` is ORG/NAME/files."""

    def answer(self, path: str, query: dict[str, list[str]]) -> None:
        listed = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/]+)", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        asked = listed or file
        folder = self.site.root / asked[1] if asked else self.site.root / "nothing"
        if not folder.is_dir():
            self._send(404, b"", X_Error_Code="RepoNotFound")
        elif asked and asked[3 if listed else 2] not in ("main", "v2", COMMIT):
            self._send(404, b"", X_Error_Code="RevisionNotFound")
        elif file and not (folder / file[3]).is_file():
            self._send(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        elif file:
            self.send_file(folder / file[3], X_Repo_Commit=COMMIT)
        elif listed and listed[2] == "revision":
            names = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]
            sizes = {name: (folder / name).stat().st_size for name in names}
            siblings = [{"rfilename": name, "size": size} for name, size in sizes.items()]
            about = {"id": listed[1], "sha": COMMIT, "siblings": siblings}
            self._send(200, json.dumps(about).encode(), Content_Type="application/json")
        else:
            tree = [
                {"type": "file", "path": str(p.relative_to(folder)), "size": p.stat().st_size,
                 "oid": hashlib.sha1(p.read_bytes()).hexdigest()}
                for p in sorted(folder.rglob("*")) if p.is_file()
            ]  # fmt: skip
            self._send(200, json.dumps(tree).encode(), Content_Type="application/json")


class S3(Files):
    """GetObject, HeadObject, PutObject and ListObjectsV2, path style; `root` is BUCKET/keys."""

    def do_PUT(self) -> None:
        self.body = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer()

    def answer(self, path: str, query: dict[str, list[str]]) -> None:
        file = self.site.root / path.strip("/")
        bucket, prefix = self.site.root / path.split("/")[1], query.get("prefix", [""])[0]
        lists = "list-type" in query
        if (lists or self.command == "PUT") and not bucket.is_dir():
            self._send(404, b"<Error><Code>NoSuchBucket</Code></Error>")
            return
        if not lists:
            (self._keep if self.command == "PUT" else self.send_file)(file)
            return
        keys = [(str(p.relative_to(bucket)), p) for p in sorted(bucket.rglob("*")) if p.is_file()]
        found = "".join(
            f"<Contents><Key>{key}</Key><LastModified>2026-09-01T00:00:00.000Z</LastModified>"
            f"<ETag>&quot;{hashlib.sha256(p.read_bytes()).hexdigest()}&quot;</ETag>"
            f"<Size>{p.stat().st_size}</Size></Contents>"
            for key, p in keys
            if key.startswith(prefix) and "/" not in key.removeprefix(prefix)
        )
        body = f"<ListBucketResult><IsTruncated>false</IsTruncated>{found}</ListBucketResult>"
        self._send(200, body.encode(), Content_Type="application/xml")

    def _keep(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{id(self)}")
        part.write_bytes(self.body)
        part.rename(path)
        self._send(200, b"", ETag=f'"{hashlib.sha256(self.body).hexdigest()}"')
