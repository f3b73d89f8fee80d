"""Start the three services through BentoML, one server for each TRIMTAB_HOME."""

from __future__ import annotations

import fcntl
import os
import socket
import ssl
import sys
from pathlib import Path

from services.errors import ServingError

__all__ = ["ServeError", "check_port", "command_and_environment", "lock_home", "tls_context"]

_ROOT = Path(__file__).resolve().parent.parent


class ServeError(ServingError):
    """The server cannot be started; the message says what to change."""


def lock_home(home: Path, variable: str = "TRIMTAB_HOME") -> int:
    """Take the lock of a folder and return its descriptor, which an exec'd server inherits.

    Two servers may share neither TRIMTAB_HOME, which has one token and one set of reports, nor BENTOML_HOME, where the
    second one would delete the first one's metrics files.

    Raises:
        ServeError: another server holds it, or it cannot be written; `variable` says which one to change.
    """
    try:
        home.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(home / "serve.lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise ServeError(
            f"{variable}={home} cannot be written ({error.strerror}): set {variable} to another folder"
        ) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ServeError(
            f"a server already runs with {variable}={home}: stop it, or set another {variable}"
        ) from None
    os.set_inheritable(descriptor, True)
    return descriptor


def check_port(host: str, port: int, option: str = "--port") -> None:
    """Raise ServeError if the port is taken, before three processes find out one by one."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServeError(
                f"cannot listen on {host}:{port} ({error.strerror}): pass another {option}, or another --host"
            ) from None


def tls_context(certificate: Path | str, key: Path | str) -> ssl.SSLContext:
    """What a server needs to speak TLS.

    Raises:
        ServeError: the files cannot be read, are no PEM, or do not belong together.
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(certificate, key)
    except OSError as error:  # ssl.SSLError is one
        raise ServeError(
            f"TLS with certificate {certificate} and key {key}: {error.strerror or error}; give a PEM "
            "certificate and the key that belongs to it"
        ) from None
    return context


def command_and_environment(
    workload: str,
    host: str,
    port: int,
    workers: int,
    data_port: int,
    certificate: Path | None = None,
    key: Path | None = None,
) -> tuple[list[str], dict[str, str]]:
    """The `bentoml serve` command and the environment its processes need."""
    workload = workload if ":" in workload else str(Path(workload).absolute())
    environment = dict(os.environ) | {
        "TRIMTAB_WORKLOAD": workload,
        "TRIMTAB_WORKERS": str(workers),
        "TRIMTAB_DATA_HOST": host,
        "TRIMTAB_DATA_PORT": str(data_port),
        # The services import from the sources' folder whatever the working directory is.
        "PYTHONPATH": os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH", "")])),
    }
    command = [sys.executable, "-m", "bentoml", "serve", "services.gateway:Gateway"]
    command += ["--working-dir", str(_ROOT), "--host", host, "--port", str(port)]
    if certificate is not None and key is not None:
        certificate, key = certificate.absolute(), key.absolute()
        command += ["--ssl-certfile", str(certificate), "--ssl-keyfile", str(key)]
        environment |= {"TRIMTAB_TLS_CERT": str(certificate), "TRIMTAB_TLS_KEY": str(key)}
    # A stopping worker first answers what it has; without a limit an open connection could hold it for ever.
    command += ["--timeout-graceful-shutdown", "10"]
    return command, environment
