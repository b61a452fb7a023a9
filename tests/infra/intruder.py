"""Another user of this machine, without a key, at the doors of the stack: `python intruder.py` with its task on stdin.

Says in JSON what every door answered. All that it needs is imported first: the user `nobody` cannot read our files.
"""

from __future__ import annotations

import copy  # noqa: F401 - grpc imports it late
import encodings.idna  # noqa: F401 - urllib imports it late
import importlib
import json
import os
import pkgutil
import socket
import ssl
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from urllib.error import HTTPError

import grpc
import ray.core.generated

NOBODY = 65534
TIMEOUT_S = 10.0

TRUSTING = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
TRUSTING.check_hostname, TRUSTING.verify_mode = False, ssl.CERT_NONE
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=TRUSTING))


def ray_methods() -> list[tuple[str, bool, bool]]:
    """Every method of every gRPC service that Ray's Python knows, and the two that only its C++ does."""
    found = {("/ray.rpc.ObjectManagerService/Push", False, False), ("/ray.rpc.ObjectManagerService/Pull", False, False)}
    for module in pkgutil.iter_modules(ray.core.generated.__path__):
        if module.name.endswith("_pb2"):
            services = importlib.import_module(f"ray.core.generated.{module.name}").DESCRIPTOR.services_by_name
            for service in services.values():
                for method in service.methods:
                    path = f"/{service.full_name}/{method.name}"
                    found.add((path, method.client_streaming, method.server_streaming))
    return sorted(found)


def knock(port: int, scheme: str, method: str, path: str) -> dict[str, object]:
    request = {"port": port, "scheme": scheme, "method": method, "path": path}
    return request | http(f"{scheme}://127.0.0.1:{port}{path}", method)


def http(url: str, method: str) -> dict[str, object]:
    request = urllib.request.Request(url, data=None if method == "GET" else b"{}", method=method)
    try:
        with OPENER.open(request, timeout=TIMEOUT_S) as answer:
            return {"status": answer.status, "body": answer.read(1_000_000).decode(errors="replace")}
    except HTTPError as error:
        try:
            return {"status": error.code, "body": error.read(2000).decode(errors="replace")}
        except OSError as reset:  # refused, and hung up on before the words of it were read
            return {"status": error.code, "body": repr(reset)}
    except Exception as error:  # noqa: BLE001 - a door that does not open, in whatever way
        return {"status": 0, "body": repr(error)}


def call(channel: grpc.Channel, path: str, client_streams: bool, server_streams: bool) -> str:
    try:
        if client_streams:
            kind = channel.stream_stream if server_streams else channel.stream_unary
            answer = kind(path)(iter([b""]), timeout=TIMEOUT_S)
        else:
            kind = channel.unary_stream if server_streams else channel.unary_unary
            answer = kind(path)(b"", timeout=TIMEOUT_S)
        if server_streams:
            next(answer, None)
        return "OK"
    except grpc.RpcError as error:
        return error.code().name


def main() -> None:
    task = json.load(sys.stdin)
    methods = ray_methods()
    weed = os.open(task["weed"], os.O_RDONLY)
    os.set_inheritable(weed, True)
    http("http://127.0.0.1:1/", "GET")
    grpc.insecure_channel("127.0.0.1:1").close()
    if os.getuid() == 0:
        os.chdir("/")
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    told: dict[str, object] = {"uid": os.getuid()}
    with ThreadPoolExecutor(8) as pool:
        doors = product(task["ports"], ("http", "https"), task["requests"])
        told["http"] = [*pool.map(lambda door: knock(door[0], door[1], *door[2]), doors)]
    told["grpc"] = []
    for port in task["grpc"]:
        channel = grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.enable_http_proxy", 0)])
        told["grpc"] += [{"port": port, "method": path, "code": call(channel, path, *kind)} for path, *kind in methods]
        channel.close()
    told["sockets"] = {}
    for path in task["sockets"]:
        with socket.socket(socket.AF_UNIX) as door:
            try:
                door.connect(path)
                told["sockets"][path] = "open"
            except OSError as error:
                told["sockets"][path] = type(error).__name__
    told["folders"] = {}
    for path in task["folders"]:
        try:
            told["folders"][path] = os.listdir(path)  # noqa: PTH208
        except OSError as error:
            told["folders"][path] = type(error).__name__
    told["shell"] = []
    for command in task["shell"]:
        shell = ["weed", "-logtostderr=true", "shell", f"-master={task['master']}"]
        with subprocess.Popen(
            shell, executable=f"/proc/self/fd/{weed}", pass_fds=[weed], env={"HOME": "/nonexistent"}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        ) as process:  # fmt: skip
            try:
                said, _ = process.communicate(command, timeout=5)
            except subprocess.TimeoutExpired:  # without the master it waits for ever
                process.kill()
                said, _ = process.communicate()
            told["shell"].append(said)
    json.dump(told, sys.stdout)


if __name__ == "__main__":
    main()
