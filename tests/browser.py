"A headless Chromium, driven over its debugging protocol, and a server of the built site."

import contextlib
import functools
import http.server
import json
import shutil
import subprocess
import threading
import time
import urllib.request
from base64 import b64decode
from pathlib import Path

import websocket

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --disable-default-apps --hide-scrollbars --mute-audio
    --disable-dev-shm-usage --remote-debugging-port=0 --remote-allow-origins=*""".split()


SLOW = 300  # seconds that a busy machine may take for one step


def chromium() -> str | None:
    "The path of a Chromium on this machine, or None."
    return next(filter(None, map(shutil.which, NAMES)), None)


class Tab:
    "One page of a browser: go somewhere, run JavaScript, take pictures, remember requests and complaints."

    def __init__(self, address: str):
        self.socket = websocket.create_connection(address, timeout=SLOW)
        self.number, self.requests, self.complaints, self.loaded = 0, [], [], False
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params) -> dict:
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": params}))
        while True:
            answer = json.loads(self.socket.recv())
            if answer.get("id") == self.number:
                assert "error" not in answer, (method, answer)
                return answer["result"]
            self.note(answer)

    def note(self, event: dict) -> None:
        method, params = event.get("method"), event.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Network.loadingFailed" and not params.get("canceled"):
            self.complaints.append(params.get("errorText", "loading failed"))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(params["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.complaints.append(str([a.get("value", a.get("description")) for a in params["args"]]))
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(params["exceptionDetails"].get("text", "exception"))
        elif method == "Page.loadEventFired":
            self.loaded = True

    def js(self, expression: str):
        "The value of a JavaScript expression; a promise is waited for."
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def go(self, url: str) -> None:
        "Open a page and wait until it has loaded and its maths is set."
        self.loaded = False
        self.send("Page.navigate", url=url)
        while not self.loaded:
            self.note(json.loads(self.socket.recv()))
        self.js("window.MathJax?.startup?.promise?.then(() => true) ?? true")

    def wait(self, condition: str, seconds: float = SLOW) -> None:
        end = time.time() + seconds
        while not self.js(condition):
            assert time.time() < end, f"waited {seconds} s for {condition}"
            time.sleep(0.05)

    def size(self, width: int, height: int, phone: bool = False) -> None:
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )

    def scheme(self, name: str) -> None:
        "What the reader's system prefers: 'light' or 'dark'."
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def picture(self, path: Path, whole: bool = False) -> Path:
        data = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(b64decode(data))
        return path


@contextlib.contextmanager
def open_tab(profile: Path):
    "A tab of a fresh browser with the profile folder `profile`; closed at the end."
    process = subprocess.Popen(
        [chromium(), *FLAGS, f"--user-data-dir={profile}", "about:blank"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        port_file, end = profile / "DevToolsActivePort", time.time() + SLOW
        while not (port_file.exists() and port_file.read_text().count("\n")):
            assert process.poll() is None and time.time() < end, "Chromium did not start"
            time.sleep(0.05)
        port = port_file.read_text().splitlines()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=SLOW) as answer:
            targets = json.load(answer)
        tab = Tab(next(t for t in targets if t["type"] == "page")["webSocketDebuggerUrl"])
        yield tab
        tab.socket.close()
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


@contextlib.contextmanager
def serve(folder: Path):
    "The address of a server of `folder` on this machine."

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
