"""Downloads of known files: verified by checksum, tried again, with a progress bar; and an answer soon when offline."""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import filelock
import pooch
from tqdm import tqdm

from vae_jax.system import signals
from vae_jax.system.console import say
from vae_jax.system.errors import DataError, reason

# Seconds to connect, and seconds of silence after which a connection counts as lost.
TIMEOUT = (5, 15)
# Seconds for a server's first answer, looking up its address included.
REACH_SECONDS = 8
RETRIES = 2
OFFLINE = (
    "offline, use --data mnist (bundled), --data FOLDER (IDX files), or --data-dir FOLDER (with a copy made elsewhere)"
)


def fetch(spec: str, url: str, sha256: Mapping[str, str], folder: Path) -> None:
    """Downloads the files of a set that `folder` lacks or holds damaged, and verifies their checksums.

    Processes that start at the same time wait for each other. Whatever stops a download, no partial file stays.

    Args:
      spec: The set's name in messages.
      url: The address of the files' folder, with a slash at its end.
      sha256: The names of the files, and the checksum of each.
      folder: Where to put the files.

    Raises:
      DataError: A file cannot be downloaded or stored, or has a wrong checksum.
    """
    pooch.get_logger().setLevel("WARNING")
    files = pooch.create(folder, url, registry=dict(sha256), retry_if_failed=RETRIES)
    file = ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(spec, folder), signals.raise_on_signal():
            # pooch writes to temporary files; a killed process leaves them behind.
            for left in folder.glob("tmp*"):
                left.unlink()
            for file in sha256:
                files.fetch(file, downloader=_download)  # pyright: ignore[reportArgumentType]
    except (OSError, ValueError) as error:  # those of requests are OSErrors; a wrong checksum is a ValueError
        if isinstance(error, ValueError):
            problem = f"has a wrong checksum and was thrown away; expected SHA-256 {sha256[file][:12]}..."
        else:
            problem = f"cannot be downloaded to {folder} ({reason(root_cause(error))})"
        raise DataError(f"--data {spec}: {url}{file} {problem}; try again later; {OFFLINE}") from None


def _lock(spec: str, folder: Path) -> filelock.AcquireReturnProxy:
    lock = filelock.FileLock(folder / "vae_jax.lock")
    try:
        return lock.acquire(timeout=0)
    except filelock.Timeout:
        say(f"{spec}: waiting for another process that is downloading it")
        return lock.acquire()


def _download(url: str, output_file: Any, client: Any) -> None:
    require_reachable(url)
    say(f"downloading {url}")
    # pooch sets the total; until then it must not be 0, which pooch takes for "no bar".
    bar: Any = tqdm(desc=url.rsplit("/", 1)[1], total=1, unit="B", unit_scale=True, leave=False, disable=None)
    with bar:
        pooch.HTTPDownloader(progressbar=bar, chunk_size=1 << 16, timeout=TIMEOUT)(url, output_file, client)


def require_reachable(url: str) -> None:
    """Asks a server for the header of a file; any answer will do, even an error.

    Raises:
      ConnectionError: No answer has come within `REACH_SECONDS`.
    """
    outcome: list[Exception | None] = []

    def ask() -> None:
        try:
            pooch.HTTPDownloader(timeout=TIMEOUT)(url, None, None, check_only=True)
            outcome.append(None)
        except Exception as error:
            outcome.append(error)

    # In a thread that may be abandoned: looking up an address cannot be given a timeout.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(REACH_SECONDS)
    error = outcome[0] if outcome else TimeoutError(f"no answer within {REACH_SECONDS} seconds")
    if error:
        raise ConnectionError(f"{urlsplit(url).hostname} cannot be reached: {reason(root_cause(error))}")


def root_cause(error: BaseException) -> BaseException:
    """The first error of a chain; libraries wrap it in errors that say less."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return error
