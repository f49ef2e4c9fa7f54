"""A hub on this machine, which knows the few addresses that fetching an adapter asks for."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

COMMIT = "1234567890" * 4


@contextmanager
def fake_hub(files: dict[str, bytes], refuse: tuple[int, str] | None = None) -> Iterator[tuple[str, list[str]]]:
    """Its address, and what has been asked for. files: of its one repository, someone/adapter, with the branch main.

    refuse: status and X-Error-Code of every answer instead.
    """
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *words):
            pass

        def answer(self, status: int, body: bytes = b"", **headers):
            self.send_response(status)
            for name, value in {"Content-Length": len(body), **headers}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self):
            path = self.path.partition("?")[0]
            asked.append(f"{self.command} {path}")
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in files.items()
            ]
            info = {"id": "someone/adapter", "sha": COMMIT}
            known = {
                "/api/models/someone/adapter/revision/main": json.dumps(info).encode(),
                "/api/models/someone/adapter": json.dumps(info).encode(),
                f"/api/models/someone/adapter/tree/{COMMIT}": json.dumps(tree).encode(),
            } | {f"/someone/adapter/resolve/{COMMIT}/{name}": content for name, content in files.items()}
            if refuse is not None:
                self.answer(refuse[0], X_Error_Code=refuse[1])
            elif path in known:
                etag = f'"{hashlib.sha1(known[path]).hexdigest()}"'
                self.answer(200, known[path], ETag=etag, X_Repo_Commit=COMMIT)
            elif path.startswith("/api/models/someone/adapter/"):
                self.answer(404, X_Error_Code="RevisionNotFound")
            else:
                self.answer(404, X_Error_Code="RepoNotFound")

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
