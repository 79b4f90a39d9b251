"""A small HTTP service, the demo's and the tests' guest.

    GET  /         who answers: kernel, process, host name, requests so far
    GET  /healthz  ok
    POST /echo     the request's body
    PUT  /write?path=/x   writes the body to a file and answers its size

SIGTERM ends it with status 0 after the requests under way.
"""

import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

STARTED = time.time()
COUNT_LOCK = threading.Lock()
count = 0


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "chsnap-demo"
    # Headers and body leave in one segment each: without it, Nagle and delayed ACK cost 40 ms.
    disable_nagle_algorithm = True

    def log_message(self, text, *args):
        sys.stdout.write("%s %s\n" % (self.client_address[0], text % args))
        sys.stdout.flush()

    def address_string(self):
        return self.client_address[0]

    def answer(self, status, body, kind="application/json"):
        if not isinstance(body, bytes):
            body = json.dumps(body).encode() + b"\n"
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_GET(self):
        global count
        path = urlsplit(self.path).path
        if path == "/":
            with COUNT_LOCK:
                count += 1
                n = count
            u = os.uname()
            self.answer(
                200,
                {
                    "hello": "from a microVM",
                    "kernel": u.release,
                    # A kernel of its own, though it may be of the host's release.
                    "boot_id": open("/proc/sys/kernel/random/boot_id").read().strip(),
                    "machine": u.machine,
                    "hostname": u.nodename,
                    "pid": os.getpid(),
                    "python": sys.version.split()[0],
                    "requests": n,
                    "uptime_s": round(time.time() - STARTED, 3),
                },
            )
        elif path == "/healthz":
            self.answer(200, b"ok\n", "text/plain")
        else:
            self.answer(404, {"error": "no such path", "path": path})

    def do_POST(self):
        body = self.body()
        if urlsplit(self.path).path == "/echo":
            self.answer(200, body, self.headers.get("Content-Type", "application/octet-stream"))
        else:
            self.answer(404, {"error": "no such path"})

    def do_PUT(self):
        body = self.body()
        url = urlsplit(self.path)
        paths = parse_qs(url.query).get("path")
        if url.path != "/write" or not paths:
            self.answer(404, {"error": "use PUT /write?path=/some/file"})
            return
        try:
            with open(paths[0], "wb") as f:
                f.write(body)
        except OSError as e:
            self.answer(500, {"error": e.strerror, "path": paths[0]})
            return
        self.answer(200, {"path": paths[0], "size": len(body)})


class Server(ThreadingHTTPServer):
    request_queue_size = 128


def main(handler=Handler):
    port = int(os.environ.get("PORT", "8080"))
    server = Server(("0.0.0.0", port), handler)
    # shutdown() waits for serve_forever(), which this thread runs.
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    print(f"listening on port {port}", flush=True)
    server.serve_forever()
    server.server_close()


if __name__ == "__main__":
    main()
