"""As much of the hub's API as uploading and pinning need, on this machine."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """A server for as long as the `with` lasts.

    Attributes:
        environment: by which a process takes it for the hub.
        uploaded: the paths of all files that were committed.
        tokens: with which it was asked.
    """

    def __init__(self) -> None:
        self.uploaded: set[str] = set()
        self.tokens: set[str | None] = set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def _answer(self, value: dict) -> None:
                content = json.dumps(value).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def do_GET(self) -> None:
                name = "/".join(self.path.split("/")[3:5])
                self._answer({"id": name, "sha": COMMIT, "siblings": []})

            def do_POST(self) -> None:
                hub.tokens.add(self.headers.get("Authorization"))
                body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
                if self.path.endswith("/preupload/main"):
                    files = json.loads(body)["files"]
                    modes = [
                        {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                        for f in files
                    ]
                    self._answer({"files": modes})
                elif "/commit/" in self.path:
                    for line in map(json.loads, body.splitlines()):
                        if line["key"] == "file":
                            hub.uploaded.add(line["value"]["path"])
                    url = f"{hub.url}/me/model/commit/{COMMIT}"
                    self._answer({"commitUrl": url, "commitOid": COMMIT})
                else:
                    self._answer({"url": f"{hub.url}/me/model", "name": "me/model"})

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.environment = {
            "HF_ENDPOINT": self.url,
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": "hf_of_the_test",
            "HF_HUB_DISABLE_XET": "1",
        }

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
